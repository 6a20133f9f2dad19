"""The networks that are adapted, by name or from a file."""
