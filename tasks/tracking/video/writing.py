"""The annotated video and the table of boxes, under their final names only when they are whole.

Both are written beside their final place under a hidden name and renamed when the block ends,
whatever ends it: Ctrl-C or a damaged frame keep what was tracked before. Nothing is left of a
block that wrote no frame.
"""

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import cv2
import numpy as np
from jaxtyping import Float

from tasks.tracking.images import Frame
from visionlora.errors import OutputError
from visionlora.io.atomic import write_atomically

__all__ = ["BoxFile", "VideoFile"]

CODEC = "mp4v"
"""MPEG-4 part 2, which every build of OpenCV can write."""


File = TypeVar("File", bound="_Partial")


class _Partial:
    """A file that gets its name at the end of a `with` block, if `count` is not 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0

    def __enter__(self: File) -> File:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.stem}.", suffix=self.path.suffix
            )
            os.close(handle)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.partial = Path(name)
        return self

    def close(self) -> None:
        """End the file's content."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
            if self.count:
                write_atomically(self.path, lambda name: os.replace(self.partial, name))
        finally:
            self.partial.unlink(missing_ok=True)


class VideoFile(_Partial):
    """An mp4 of RGB frames of one size."""

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__(path)
        self.fps = fps
        self._writer: Any = None

    def write(self, image: Frame) -> None:
        """Append a frame."""
        if self._writer is None:
            size = (image.shape[1], image.shape[0])
            code = cv2.VideoWriter.fourcc(*CODEC)
            self._writer = cv2.VideoWriter(str(self.partial), code, self.fps, size)
            if not self._writer.isOpened():
                raise OutputError(f"OpenCV cannot write {self.path} with codec {CODEC}")
        self._writer.write(np.ascontiguousarray(image[..., ::-1]))
        self.count += 1

    def close(self) -> None:
        """Write the index of the frames; OpenCV says nothing when the disk is full."""
        if self._writer is None:
            return
        self._writer.release()
        reader = cv2.VideoCapture(str(self.partial))
        whole = reader.isOpened() and reader.get(cv2.CAP_PROP_FRAME_COUNT) >= self.count
        reader.release()
        if not whole:
            raise OutputError(f"{self.path} could not be written completely; is the disk full?")


class BoxFile(_Partial):
    """A CSV file with a line `frame,x,y,w,h,score` per frame; frames and pixels count from 0."""

    def __enter__(self) -> "BoxFile":
        super().__enter__()
        self._stream = self.partial.open("w", encoding="utf-8")
        self._stream.write("frame,x,y,w,h,score\n")
        return self

    def write(self, box: Float[np.ndarray, "4"], score: float) -> None:
        """Append the box of the next frame."""
        numbers = ",".join(f"{value:.3f}" for value in box)
        self._stream.write(f"{self.count},{numbers},{score:.4f}\n")
        self.count += 1

    def close(self) -> None:
        """Flush to the disk."""
        try:
            self._stream.close()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
