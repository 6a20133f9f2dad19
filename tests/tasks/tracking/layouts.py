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


def write_got10k(folder: Path, count: int = 5, first_only: bool = False) -> np.ndarray:
    """A sequence of GOT-10k with its labels; the fourth frame shows nothing of the object."""
    boxes = moving(count)
    write_frames(folder, (f"{i:08d}.jpg" for i in range(1, count + 1)))
    write_lines(folder / "groundtruth.txt", boxes[:1] if first_only else boxes)
    if not first_only:
        unseen = np.arange(count) == 3
        write_lines(folder / "absence.label", unseen[:, None].astype(int))
        write_lines(folder / "cover.label", np.where(unseen, 0, 8)[:, None])
        (folder / "meta_info.ini").write_text(f"[METAINFO]\nresolution: {SIZE}\n")
    return boxes


def write_trackingnet(
    chunk: Path, name: str, count: int = 5, first_only: bool = True
) -> np.ndarray:
    """A video of a chunk (`TEST`, `TRAIN_0`); frames are counted from 0."""
    boxes = moving(count)
    write_frames(chunk / "frames" / name, (f"{i}.jpg" for i in range(count)))
    write_lines(chunk / "anno" / f"{name}.txt", boxes[:1] if first_only else boxes)


def write_otb(
    video: Path, first: int, count: int, file: str = "groundtruth_rect.txt"
) -> np.ndarray:
    """A video of OTB with frames before the first one that has a box."""
    boxes = moving(count)
    numbers = range(max(1, first - 2), first + count)
    write_frames(video / "img", (f"{i:04d}.jpg" for i in numbers))
    write_lines(video / file, boxes, separator="\t")


def write_nfs(root: Path, name: str, count: int, at_30: int) -> np.ndarray:
    """A video of NFS: boxes of `count` frames at 240 fps, images at 30 fps."""
    boxes = moving(count)
    write_frames(root / name / "30" / name, (f"{i:05d}.jpg" for i in range(1, at_30 + 1)))
    rows = [
        f'0 {x:g} {y:g} {x + w:g} {y + h:g} {i} 0 0 {int(i % 3 > 0)} "ball"'
        for i, (x, y, w, h) in enumerate(boxes, 1)
    ]
    (root / name / "30" / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return boxes
