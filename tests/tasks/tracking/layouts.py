"""Writes small data sets as the benchmarks lay them out: noise for frames, a box that moves."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 30)
"""Width and height of every frame."""


def moving(count: int, origin: int = 0) -> np.ndarray:
    """Boxes of a 10 x 8 object that moves by a pixel to the right each frame."""
    steps = np.arange(count, dtype=np.float64)
    return np.stack(
        [4 + steps + origin, np.full(count, 5.0 + origin), np.full(count, 10), np.full(count, 8)], 1
    )


def write_lines(path: Path, rows: Iterable[Iterable[float]], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(separator.join(f"{v:g}" for v in row) + "\n" for row in rows))


def write_frames(folder: Path, names: Iterable[str], size: tuple[int, int] = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name in names:
        image.save(folder / name)


def write_lasot(folder: Path, count: int = 5, images: int | None = None) -> np.ndarray:
    """A sequence of LaSOT; returns its boxes as the file has them (1-based)."""
    boxes = moving(count, origin=1)
    write_frames(folder / "img", (f"{i:08d}.jpg" for i in range(1, (images or count) + 1)))
    write_lines(folder / "groundtruth.txt", boxes)
    return boxes
