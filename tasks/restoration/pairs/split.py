"""Disjoint parts of a list of pairs, the same ones for everyone who says the same seed.

    order   the pairs by name, shuffled by the seed
    test    the first ones,  then validation,  then training

so that a larger training set contains a smaller one, and test pairs are the same for all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from visionlora.errors import DataError

Item = TypeVar("Item")


class Split(NamedTuple):
    """Places in the list."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split(
    names: Sequence[str], *, test: int, validation: int, train: int | None = None, seed: int = 0
) -> Split:
    """Return which pairs are for what.

    Args:
        names: names of all pairs.
        test: pairs for the figures.
        validation: pairs on which settings are chosen.
        train: pairs to train on; all others by default.
        seed: of the order.

    Raises:
        DataError: there are not so many pairs.
    """
    by_name = sorted(range(len(names)), key=lambda index: names[index])
    order = [by_name[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held = test + validation
    wanted = held + (1 if train is None else train)
    if wanted > len(names):
        raise DataError(
            f"{len(names)} pairs are too few for {test} to test, {validation} to validate and "
            f"{wanted - held} to train on"
        )
    stop = len(names) if train is None else wanted
    return Split(tuple(order[held:stop]), tuple(order[test:held]), tuple(order[:test]))
