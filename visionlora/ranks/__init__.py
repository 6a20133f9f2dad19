"""Rank allocation: which parameters a running training has, and who decides it."""

from visionlora.ranks.controller import Controller, Penalties, controllers_of
from visionlora.ranks.finalize import finalize

__all__ = ["Controller", "Penalties", "controllers_of", "finalize"]
