"""Restoring a picture of any size with a network."""
