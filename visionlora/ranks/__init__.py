"""Rank allocation: which parameters a running training has, and who decides it."""
