"""Pictures on disk: of one, three or four channels, of 8 or 16 bits, and what cannot be read.

Inside the task a picture is float32 RGB in [0, 1]; what it was is remembered, so that a restored
picture is written as it came: grey stays grey, transparency and 16 bits stay.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from numpy.typing import DTypeLike
from PIL import Image

from visionlora.errors import DataError, OutputError
from visionlora.io.atomic import write_atomically

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
DEEP = frozenset({".png", ".tif", ".tiff"})
"""Formats that hold 16 bits and transparency here."""
Levels = Shaped[np.ndarray, "h w 3"]
"""RGB as it is stored, 8 or 16 bits."""


@dataclass(frozen=True)
class Picture:
    """A picture as it was stored."""

    levels: Levels
    alpha: Shaped[np.ndarray, "h w"] | None = None
    grey: bool = False

    @property
    def largest(self) -> int:
        """The level of white."""
        return int(np.iinfo(self.levels.dtype).max)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.levels.shape[:2]
        return height, width

    @property
    def pixels(self) -> Float[np.ndarray, "h w 3"]:
        """The picture in [0, 1]."""
        return self.levels.astype(np.float32) / self.largest

    @property
    def in_8_bits(self) -> Levels:
        """The picture as figures are computed on it."""
        return self.levels if self.largest == 255 else to_levels(self.pixels)


def read_picture(path: str | Path) -> Picture:
    """Read a picture as it is stored; an orientation in its metadata is not applied.

    Raises:
        DataError: the file is missing or no picture.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no picture {file}")
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    stored = _decoded(data, flags) if data.size else None
    if stored is None or stored.dtype not in (np.uint8, np.uint16):
        why = "cannot be read" if stored is None else f"holds {stored.dtype}, not 8 or 16 bits"
        raise DataError(f"{file} {why}")
    if stored.ndim == 2:
        return Picture(np.repeat(stored[..., None], 3, axis=2), grey=True)
    alpha = stored[..., 3] if stored.shape[2] == 4 else None
    levels = np.ascontiguousarray(stored[..., 2::-1])
    return Picture(levels, None if alpha is None else np.ascontiguousarray(alpha))


def header_size(path: str | Path) -> tuple[int, int]:
    """Return height and width by the header of a file, which costs nothing.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError(f"{path} cannot be read") from None


def _decoded(data: UInt8[np.ndarray, " n"], flags: int) -> np.ndarray | None:
    """Decode a picture; None if it is none, is cut short, or claims more pixels than allowed."""
    loud = cv2.utils.logging.setLogLevel(0)  # it names functions, not files
    try:
        return cv2.imdecode(data, flags)
    except cv2.error:
        return None
    finally:
        cv2.utils.logging.setLogLevel(loud)


def to_levels(pixels: Float[np.ndarray, "h w 3"], dtype: DTypeLike = np.uint8) -> Levels:
    """Return values in [0, 1], clamped and rounded, as integers."""
    largest = np.iinfo(np.dtype(dtype)).max
    return np.rint(pixels.clip(0, 1) * largest).astype(np.dtype(dtype))


def write_picture(path: str | Path, pixels: Float[np.ndarray, "h w 3"], like: Picture) -> Path:
    """Write values in [0, 1] completely or not at all, in the depth and channels of `like`.

    Raises:
        OutputError: the format is unknown or cannot hold it, or the file cannot be written.
    """
    return write_levels(path, to_levels(pixels, like.levels.dtype), like)


def write_levels(path: str | Path, levels: Levels, like: Picture) -> Path:
    """Write levels in the same way.

    Raises:
        OutputError: see `write_picture`.
    """
    file = Path(path)
    check_format(file, like)
    stored = levels[..., ::-1]
    if like.grey:
        stored = np.rint(levels.mean(axis=2)).astype(levels.dtype)
    elif like.alpha is not None:
        stored = np.concatenate([stored, like.alpha[..., None]], axis=2)
    done, data = cv2.imencode(file.suffix.lower(), np.ascontiguousarray(stored))
    if not done:
        raise OutputError(f"{file} cannot be encoded")
    return write_atomically(file, lambda temporary: _write(temporary, data.tobytes()))


def check_format(file: Path, like: Picture) -> None:
    """Refuse a format that does not hold the depth and channels of a picture.

    Raises:
        OutputError: or the format is unknown.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(f"{file}: unknown picture format; known: {', '.join(sorted(SUFFIXES))}")
    if suffix not in DEEP and (like.largest > 255 or like.alpha is not None):
        raise OutputError(f"{file}: {suffix[1:]} holds neither 16 bits nor transparency; use png")


def pictures_below(folder: str | Path) -> list[Path]:
    """Return the pictures of a folder and its folders, in the order of their paths.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder of pictures {root}")
    files = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"no picture in {root}")
    return sorted(files)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
