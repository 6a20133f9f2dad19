"""The files of a sequence's frames: by number, where a benchmark numbers them, or by sorting."""

import itertools
import os
import re
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from PIL import ExifTags, Image, UnidentifiedImageError

from tasks.tracking.sequences.found import few
from tasks.tracking.sequences.sequence import Frames
from visionlora.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
"""Of images, the likely ones first."""


@dataclass(frozen=True)
class NumberedFrames(Ordered[Path]):
    """Paths made from numbers when they are asked for: 14 million frames cost nothing."""

    folder: Path
    pattern: str
    """A file's name around its number, such as `{:08d}.jpg`."""
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "NumberedFrames": ...
    def __getitem__(self, index: int | slice) -> "Path | NumberedFrames":
        if isinstance(index, slice):
            return NumberedFrames(self.folder, self.pattern, self.numbers[index])
        return self.folder / self.pattern.format(self.numbers[index])


def numbered(folder: Path, digits: int, numbers: range, check: bool = True) -> NumberedFrames:
    """Return the frames `numbers` of `folder`, whose names are numbers of so many digits.

    The suffix is that of the first frame. Without `check` only this one is looked up, for training
    sets of many million frames.

    Raises:
        DataError: the folder or some of the frames are missing.
    """
    stem = f"{{:0{digits}d}}" if digits else "{}"
    first = stem.format(numbers[0])
    if not check:
        suffix = next((s for s in SUFFIXES if (folder / (first + s)).is_file()), ".jpg")
        return NumberedFrames(folder, stem + suffix, numbers)
    there = set(_names(folder))
    suffix = next((s for s in SUFFIXES if first + s in there), ".jpg")
    frames = NumberedFrames(folder, stem + suffix, numbers)
    if missing := [p for n in numbers if (p := (stem + suffix).format(n)) not in there]:
        raise DataError(
            f"{len(missing)} of {len(frames)} frames are missing in {folder}: {few(missing)}"
        )
    return frames


def all_numbered(folder: Path, digits: int, first: int) -> NumberedFrames:
    """Return as many frames as there are images in `folder`, counted from `first`.

    Raises:
        DataError: the folder has no images, or a number is missing between them.
    """
    return numbered(folder, digits, range(first, first + len(listed(folder))))


def listed(folder: Path) -> tuple[Path, ...]:
    """Return all images of `folder`; numbers in their names count as numbers.

    Raises:
        DataError: the folder is missing or has no images.
    """
    names = [n for n in _names(folder) if Path(n).suffix.lower() in SUFFIXES and n[0] != "."]
    if not names:
        raise DataError(f"no images in {folder}")
    return tuple(folder / name for name in sorted(names, key=natural))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key by which `img10` comes after `img9`."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((int(p), "") if odd % 2 else (-1, p) for odd, p in enumerate(parts))


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of the upright image, from the head of its file.

    Raises:
        DataError: the file is missing or is not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            lying = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (height, width) if lying else (width, height)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def match(frames: Frames, count: int, name: str, rule: str) -> None:
    """Refuse frames and boxes that differ in number.

    Raises:
        DataError: with the `rule` of this layout.
    """
    if len(frames) != count:
        raise DataError(
            f"sequence {name!r} has {len(frames)} frames but {count} boxes{_gap(frames)}; {rule}"
        )


def _gap(frames: Frames) -> str:
    """Say which number is missing between two frames, where their names are numbers."""
    stems = [path.stem for path in frames]
    if not all(stem.isdigit() for stem in stems):
        return ""
    numbers = [int(stem) for stem in stems]
    for before, after in itertools.pairwise(numbers):
        if after > before + 1:
            name = f"{before + 1:0{len(stems[0])}d}{frames[0].suffix}"
            return f" ({name} is missing in {frames[0].parent})"
    return ""


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DataError(f"no frames in {folder}: {error.strerror or error}") from error
