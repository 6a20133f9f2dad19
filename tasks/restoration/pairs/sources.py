"""Where training patches come from, as it is said on a command line.

pairs:PATH    pairs of pictures, or PATH alone
prod:PATH     clean pictures, degraded as pre-training does
derain:PATH   clean pictures, degraded by a stand-in for a task (denoise, dehaze, deblur, ...)

Every picture is read before the first patch, so that a broken one, or a pair of two sizes, is known
at once.
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
from tasks.restoration.pairs.memory import MEMORY, Memory
from visionlora.errors import ConfigError, DataError, nearest

Patch = Float[np.ndarray, "p p 3"]
PAIRS, PROD = "pairs", "prod"
SOURCES = (PAIRS, PROD, *TASKS)


class Source(Protocol):
    """Gives patches of which the second is what the first should become."""

    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw a degraded and a clean patch, the clean one in [0, 1]."""
        ...


class Pairs:
    """Patches of pairs of pictures.

    Args:
        paths: the pairs.
        memory: bytes that decoded pictures may take.

    Raises:
        DataError: no pair, a picture that cannot be read, or a pair of two sizes.
    """

    def __init__(self, paths: Sequence[PairPath], memory: int = MEMORY) -> None:
        if not paths:
            raise DataError("no pair to cut patches from")
        self.paths = tuple(paths)
        self.read = Memory(memory)
        for path in self.paths:
            check_size(path, self.read(path.input).shape, self.read(path.target).shape)
        self.notes: tuple[str, ...] = (f"{len(self)} pairs", *self.read.notes)

    def __len__(self) -> int:
        return len(self.paths)

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw the same place of both halves of a pair."""
        path = self.paths[int(rng.integers(len(self)))]
        degraded, clean = self.read(path.input), self.read(path.target)
        corner = draw_corner(clean.shape, side, rng)
        return cut(degraded, corner, side), cut(clean, corner, side)


class Clean:
    """Patches of clean pictures, degraded on the way.

    Args:
        files: the pictures; those that cannot be read are left out and noted.
        degradation: what is done to a patch.
        what: how to call it.
        memory: bytes that decoded pictures may take.

    Raises:
        DataError: no picture can be read.
    """

    def __init__(
        self, files: Sequence[Path], degradation: Degradation, what: str, memory: int = MEMORY
    ) -> None:
        self.degradation = degradation
        self.read = Memory(memory)
        self.files: list[Path] = []
        broken: list[str] = []
        for file in files:
            try:
                self.read(file)
            except DataError as error:
                broken.append(str(error))
                continue
            self.files.append(file)
        if not self.files:
            raise DataError(f"no clean picture{f'; first: {broken[0]}' if broken else ''}")
        self.notes: tuple[str, ...] = (f"{len(self)} clean pictures, degraded by {what}",)
        if broken:
            self.notes += (f"{len(broken)} pictures left out, first: {broken[0]}",)
        self.notes += self.read.notes

    def __len__(self) -> int:
        return len(self.files)

    def patch(self, side: int, rng: np.random.Generator) -> tuple[Patch, Patch]:
        """Draw a clean patch and degrade it."""
        levels = self.read(self.files[int(rng.integers(len(self)))])
        clean = cut(levels, draw_corner(levels.shape, side, rng), side)
        degraded, _ = self.degradation(clean, rng)
        return degraded, clean


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
    check_size(path, degraded.size, clean.size)
    return degraded, clean


def check_size(path: PairPath, degraded: Sequence[int], clean: Sequence[int]) -> None:
    """Compare height and width of both halves.

    Raises:
        DataError: they differ.
    """
    if tuple(degraded[:2]) != tuple(clean[:2]):
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (degraded, clean)]
        raise DataError(
            f"{path.input} is {sizes[0]} and {path.target} is {sizes[1]}: a pair needs one size"
        )


def draw_corner(shape: Sequence[int], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the top left corner of a patch in a picture of height and width `shape`."""
    top, left = (int(rng.integers(max(1, extent - side + 1))) for extent in shape[:2])
    return top, left


def cut(levels: Levels, corner: tuple[int, int], side: int) -> Patch:
    """Cut a patch out in [0, 1]; a picture that is too small is mirrored out."""
    top, left = corner
    part = levels[top : top + side, left : left + side]
    patch = part.astype(np.float32) / np.iinfo(levels.dtype).max
    missing = [(0, side - extent) for extent in patch.shape[:2]]
    return np.pad(patch, [*missing, (0, 0)], mode="symmetric") if any(map(any, missing)) else patch
