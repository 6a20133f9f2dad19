"""Adapter files: the native format, that of PEFT, conversion between them, atomic writing."""
