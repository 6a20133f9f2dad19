"""Time and memory beside a floor and beside PEFT; see README.md in this folder."""
