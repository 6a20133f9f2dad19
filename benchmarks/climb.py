"""The search for a learning rate: uphill over powers of one factor, from a rate that is known."""

from collections.abc import Callable
from typing import Any

FACTOR = 3.0
"""Neighbouring learning rates."""


def climb(score: Callable[[int], Any], start: int, most: int) -> tuple[int, dict[int, Any]]:
    """Return the best exponent of `FACTOR`, and the scores of all that were tried.

    Args:
        score: the larger the better; asked once for an exponent.
        start: where to begin.
        most: no neighbour is looked at once so many were tried.
    """
    found: dict[int, Any] = {}

    def known(step: int) -> Any:
        if step not in found:
            found[step] = score(step)
        return found[step]

    best = start
    while len(found) < most:
        around = max((best, best - 1, best + 1), key=known)
        if around == best:
            break
        best = around
    return best, found
