"""Where training patches come from, as it is said on a command line.

pairs:PATH    pairs of pictures, or PATH alone
prod:PATH     clean pictures, degraded as pre-training does
derain:PATH   clean pictures, degraded by a stand-in for a task (denoise, dehaze, deblur, ...)

Every picture is decoded once and kept as it is stored, in 8 or 16 bits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

from tasks.restoration.degradations.base import Degradation
from tasks.restoration.degradations.prod import Prod
from tasks.restoration.degradations.synthetic import TASKS
from tasks.restoration.images import Levels, Picture, pictures_below, read_picture
from tasks.restoration.pairs.layouts import AUTO, PairPath, find_pairs
from visionlora.errors import ConfigError, DataError, nearest

Patch = Float[np.ndarray, "p p 3"]
PAIRS, PROD = "pairs", "prod"
SOURCES = (PAIRS, PROD, *TASKS)


class Source(Protocol):
    """Gives patches of which the second is what the first should become."""

    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw a degraded and a clean patch in [0, 1]."""
        ...


class Pairs:
    """Patches of pairs of pictures.

    Args:
        paths: the pairs.

    Raises:
        DataError: a picture that cannot be read, or a pair of two sizes.
    """

    def __init__(self, paths: Sequence[PairPath]) -> None:
        self.pairs = [read_pair(path) for path in paths]
        self.notes: tuple[str, ...] = (f"{len(self)} pairs",)

    def __len__(self) -> int:
        return len(self.pairs)

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw the same place of both halves of a pair."""
        degraded, clean = self.pairs[int(rng.integers(len(self)))]
        corner = draw_corner(clean.size, side, rng)
        return cut(degraded.levels, corner, side), cut(clean.levels, corner, side)


class Clean:
    """Patches of clean pictures, degraded on the way.

    Args:
        files: the pictures.
        degradation: what is done to a patch.
        what: how to call it.

    Raises:
        DataError: a picture that cannot be read.
    """

    def __init__(self, files: Sequence[Path], degradation: Degradation, what: str) -> None:
        self.pictures = [read_picture(file) for file in files]
        self.degradation = degradation
        self.notes: tuple[str, ...] = (f"{len(self)} clean pictures, degraded by {what}",)

    def __len__(self) -> int:
        return len(self.pictures)

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw a clean patch and degrade it."""
        picture = self.pictures[int(rng.integers(len(self)))]
        clean = cut(picture.levels, draw_corner(picture.size, side, rng), side)
        degraded, _ = self.degradation(clean, rng)
        return np.clip(degraded, 0, 1), clean


def load_source(spec: str, *, layout: str = AUTO, prod: Prod | None = None) -> Source:
    """Return the source that a specification names.

    Raises:
        ConfigError: an unknown kind of source.
        DataError: nothing usable is there.
    """
    kind, path = split_spec(spec)
    if kind == PAIRS:
        return Pairs(find_pairs(path, layout).pairs)
    degradation = (prod or Prod()) if kind == PROD else TASKS[kind]
    return Clean(pictures_below(path), degradation, kind)


def split_spec(spec: str) -> tuple[str, str]:
    """Return kind and path.

    Raises:
        ConfigError: an unknown kind.
    """
    kind, colon, path = spec.partition(":")
    if not colon or len(kind) == 1 or "/" in kind:  # a drive letter is no kind
        return PAIRS, spec
    if kind not in SOURCES or not path:
        raise ConfigError(
            f"unknown data {spec!r}{nearest(kind, SOURCES)}; a folder of pairs, or one of "
            + ", ".join(f"{name}:FOLDER" for name in SOURCES)
        )
    return kind, path


def read_pair(path: PairPath) -> tuple[Picture, Picture]:
    """Read both halves of a pair.

    Raises:
        DataError: one cannot be read, or they differ in size.
    """
    degraded, clean = read_picture(path.input), read_picture(path.target)
    if degraded.size != clean.size:
        sizes = [f"{width} x {height}" for height, width in (degraded.size, clean.size)]
        raise DataError(
            f"{path.input} is {sizes[0]} and {path.target} is {sizes[1]}: a pair needs one size"
        )
    return degraded, clean


def draw_corner(size: tuple[int, int], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the top left corner of a patch."""
    top, left = (int(rng.integers(max(1, extent - side + 1))) for extent in size)
    return top, left


def cut(levels: Levels, corner: tuple[int, int], side: int) -> Patch:
    """Cut a patch out in [0, 1]; a picture that is too small is mirrored out."""
    top, left = corner
    part = levels[top : top + side, left : left + side]
    patch = part.astype(np.float32) / np.iinfo(levels.dtype).max
    missing = [(0, side - extent) for extent in patch.shape[:2]]
    return np.pad(patch, [*missing, (0, 0)], mode="symmetric") if any(map(any, missing)) else patch
