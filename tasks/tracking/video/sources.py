"""Frames of a folder of images, a video file or a webcam, one at a time.

| what is given | read as |
|---|---|
| a folder | its images, in the order of the numbers in their names |
| a file | a video that OpenCV can decode |
| a number | the webcam of that number, until it is stopped |
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tasks.tracking.images import Frame, read_image
from tasks.tracking.sequences.folder import IMAGES
from tasks.tracking.sequences.frames import SUFFIXES, listed
from visionlora.errors import DataError, nearest

# FFmpeg reads this once, when the first video is opened; -8 is quiet.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
FPS = 30.0
"""Speed of what does not say its own."""


@dataclass
class Source:
    """A stream of frames, RGB; iterate over it once."""

    name: str
    frames: Iterator[Frame]
    count: int | None
    """How many frames are expected: exact for a folder, what the container says for a file."""
    fps: float
    live: bool = False
    """Whether it goes on until someone stops it."""


def open_source(what: str) -> Source:
    """Open a folder, a video file or a webcam.

    Raises:
        DataError: it is not there, has no frames, or cannot be decoded.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        folder = next((path / sub for sub in IMAGES if (path / sub).is_dir()), path)
        files = listed(folder)
        return Source(path.resolve().name, _images(files), len(files), FPS)
    if path.is_file():
        return _file(path)
    if what.isdecimal():
        return _webcam(int(what))
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        f"no video {what!r}{nearest(path.name, names, count=1)}; "
        "give a video file, a folder of images, or the number of a webcam"
    )


def _images(files: tuple[Path, ...]) -> Iterator[Frame]:
    size: tuple[int, ...] | None = None
    for file in files:
        image = read_image(file)
        if size is not None and image.shape != size:
            raise DataError(
                f"frame {file} has {image.shape[1]} x {image.shape[0]} pixels, the first one "
                f"{size[1]} x {size[0]}: frames of one video must have one size"
            )
        size = image.shape
        yield image


def _file(path: Path) -> Source:
    if path.suffix.lower() in set(SUFFIXES) - {".gif"}:
        raise DataError(f"{path} is a single image; give the folder of all frames, or a video file")
    capture = _opened(str(path))
    frames = _captured(capture)
    first = next(frames, None)
    if first is None:
        raise DataError(f"cannot decode {path}: no video, a damaged one, or an unknown codec")
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Source(path.stem, _with(first, frames), count if count > 0 else None, _fps(capture))


def _webcam(number: int) -> Source:
    capture = _opened(number)
    frames = _captured(capture)
    first = next(frames, None)
    if first is None:
        raise DataError(f"webcam {number} gives no picture; is it there, and free?")
    return Source(f"webcam-{number}", _with(first, frames), None, _fps(capture), live=True)


def _with(first: Frame, others: Iterator[Frame]) -> Iterator[Frame]:
    yield first
    yield from others


def _captured(capture: Any) -> Iterator[Frame]:
    try:
        while True:
            there, image = capture.read()
            if not there:
                return
            yield np.ascontiguousarray(image[..., ::-1])
    finally:
        capture.release()


def _fps(capture: Any) -> float:
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    # Containers without a clock say 0, nan, or the number of ticks per second.
    return fps if 1 <= fps <= 1000 else FPS


def _opened(what: str | int) -> Any:
    """Open a capture; OpenCV's own complaints are left out, ours follow."""
    logging: Any = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        return cv2.VideoCapture(what)
    finally:
        logging.setLogLevel(level)
