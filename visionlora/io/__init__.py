"""Adapter files: the native format, and atomic writing."""
