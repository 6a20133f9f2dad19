"""A folder of photographs in memory, each at full, half and quarter size.

Pairs are cut out of them thousands of times, so they are decoded once. They are shrunk until all
together fit `BUDGET`; worker processes share them with the process that loaded them.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from tasks.tracking.images import Frame, read_image
from visionlora.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
BUDGET = 600 * 2**20
"""Bytes that all photographs may take."""
LARGEST = 1280
"""Longest side, in pixels, that is kept."""
SMALLEST = 64
"""A photograph with a shorter side than this holds no pair."""
LEVELS = 3
LEAST = 192
"""Shortest side to which a photograph is halved; frames about as large are cut out of it."""


class Photographs:
    """The photographs below a folder, in the order of their paths.

    Raises:
        DataError: the folder is not there or holds nothing usable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"no folder of photographs {self.folder}")
        files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        side = _side(len(files))
        unusable: list[str] = []
        self.pyramids: list[Sequence[Frame]] = []
        for file in files:
            try:
                image = _shrunk(read_image(file), side)
            except DataError as error:
                unusable.append(str(error))
                continue
            if min(image.shape[:2]) < SMALLEST:
                unusable.append(f"{file} is less than {SMALLEST} px high or wide")
                continue
            self.pyramids.append(_pyramid(image))
        if not self.pyramids:
            why = f"; first: {unusable[0]}" if unusable else ""
            raise DataError(f"{self.folder} holds no usable photograph{why}")
        self.notes: tuple[str, ...] = (f"{self.folder}: {len(self)} photographs",)
        if unusable:
            self.notes += (f"{len(unusable)} files left out, first: {unusable[0]}",)

    def __len__(self) -> int:
        return len(self.pyramids)


def _side(count: int) -> int:
    """Return the longest side at which `count` photographs, 3:2 on average, fit the budget."""
    pixels = BUDGET / (max(count, 1) * 3 * 4 / 3)  # three channels, and a third more for the levels
    return int(min(LARGEST, np.sqrt(pixels * 3 / 2)))


def _shrunk(image: Frame, side: int) -> Frame:
    factor = side / max(image.shape[:2])
    return image if factor >= 1 else _resized(image, factor)


def _pyramid(image: Frame) -> Sequence[Frame]:
    levels = [image]
    while len(levels) < LEVELS and min(levels[-1].shape[:2]) >= 2 * LEAST:
        levels.append(_resized(levels[-1], 0.5))
    return levels


def _resized(image: Frame, factor: float) -> Frame:
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
