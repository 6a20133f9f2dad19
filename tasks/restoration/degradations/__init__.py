"""Degradations of clean pictures: those of PROD, and those that stand for a task."""
