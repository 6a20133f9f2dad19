"""Which images are the K shots, and which classes are base or new.

The draw repeats the CoOp protocol bit for bit, so that results can be compared with published
ones: one random stream per run, classes in order of first appearance, `sample(items, K)` for
each class of the training pool, then the same with `min(K, 4)` on the validation pool.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from visionlora.errors import DataError

VALIDATION_SHOTS = 4
"""CoOp draws at most this many validation images a class."""

ShortClass = Literal["keep", "repeat"]


@dataclass(frozen=True, eq=False)
class Item:
    """One labelled image: a file, or pixels that are already in memory (`uint8`, HxW or HxWx3)."""

    source: Path | np.ndarray
    label: int


T = TypeVar("T", bound=Item)


def by_class(items: Iterable[T]) -> dict[int, list[T]]:
    """Group `items` by label, labels in order of first appearance."""
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def draw(
    items: Sequence[T], shots: int, rng: random.Random, short_class: ShortClass = "keep"
) -> list[T]:
    """Draw `shots` items of every class, in the order CoOp draws them.

    A class with fewer items gives all it has (`keep`) or is drawn with replacement (`repeat`).
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, got {shots}")
    drawn: list[T] = []
    for group in by_class(items).values():
        if len(group) >= shots:
            drawn += rng.sample(group, shots)
        elif short_class == "keep":
            drawn += group
        else:
            drawn += rng.choices(group, k=shots)
    return drawn


def few_shot(
    train: Sequence[T],
    val: Sequence[T],
    shots: int,
    seed: int,
    short_class: ShortClass = "keep",
) -> tuple[list[T], list[T]]:
    """Return the K-shot training items and the validation items of one run seed."""
    rng = random.Random(seed)
    drawn = draw(train, shots, rng, short_class)
    return drawn, draw(val, min(shots, VALIDATION_SHOTS), rng, short_class) if val else []


def spares(items: Sequence[T], drawn: Sequence[T], seed: int) -> dict[int, list[T]]:
    """Return, per class, the items that were not drawn, in the order they stand in for others.

    They replace drawn images that turn out to be unreadable; a stream of their own keeps the
    draw of every other image as it is.
    """
    taken = {id(item) for item in drawn}
    rest = {
        label: [item for item in group if id(item) not in taken]
        for label, group in by_class(items).items()
    }
    for label, group in rest.items():
        random.Random(f"spare {seed} {label}").shuffle(group)
    return rest


def short_classes(items: Iterable[Item], shots: int) -> dict[int, int]:
    """Return the labels with fewer than `shots` items, and how many they have."""
    return {label: len(group) for label, group in by_class(items).items() if len(group) < shots}


def base_and_new(classes: int) -> tuple[range, range]:
    """Split labels `0 .. classes-1` into the first half (rounded up) and the rest."""
    middle = -(-classes // 2)
    return range(middle), range(middle, classes)


def restrict(items: Iterable[T], labels: range) -> list[T]:
    """Keep the items of `labels`, relabelled from 0."""
    return [
        replace(item, label=item.label - labels.start) for item in items if item.label in labels
    ]
