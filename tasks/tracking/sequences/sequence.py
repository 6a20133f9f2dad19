"""One video with the boxes of one object: what trackers are evaluated on and trained with.

Boxes are `x, y, w, h` in pixels, float64, 0-based and continuous: x = 0 is the left edge of the
first pixel. Files count from `origin`, which is 1 in LaSOT; `in_file` puts it back, because
benchmarks compare boxes as their files have them.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from visionlora.errors import DataError

Frames = Ordered[Path]
"""Files of the frames, in order: a tuple, or numbers that become paths when they are asked for."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """A video to track one object in.

    `boxes` may have fewer rows than there are frames: servers keep all but the first.
    """

    name: str
    frames: Frames
    boxes: Float[np.ndarray, "annotated 4"]
    """NaN in rows without a box."""
    absent: Bool[np.ndarray, "annotated"] | None = None
    """Frames in which the object cannot be seen; None where the benchmark does not say."""
    origin: int = 0
    """What x and y of the benchmark's files are above 0-based ones."""
    attributes: tuple[str, ...] = ()
    benchmark: str = "folder"

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise DataError(f"sequence {self.name!r} has no frames")
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4 or not len(self.boxes):
            raise DataError(f"sequence {self.name!r} has boxes of shape {self.boxes.shape}")
        if len(self.boxes) > len(self.frames):
            raise DataError(
                f"sequence {self.name!r} has {len(self.frames)} frames but {len(self.boxes)} boxes"
            )
        first = self.boxes[0]
        if not np.isfinite(first).all() or first[2] <= 0 or first[3] <= 0:
            raise DataError(
                f"sequence {self.name!r} cannot be tracked: its first box is "
                f"{','.join(f'{value:g}' for value in first)} (x,y,w,h)"
            )
        if self.absent is not None and self.absent.shape != self.boxes.shape[:1]:
            raise DataError(
                f"sequence {self.name!r} has {len(self.absent)} flags of absence for "
                f"{len(self.boxes)} boxes"
            )

    def __len__(self) -> int:
        return len(self.frames)

    def in_file(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Return `boxes` as the benchmark's own files count them."""
        return boxes + np.array([self.origin, self.origin, 0.0, 0.0])


@dataclass(frozen=True, eq=False)
class Track:
    """One object over the frames of a video (or one photograph), cleaned for training."""

    name: str
    """Of the video or photograph; all its tracks share it."""
    frames: Frames
    boxes: Float[np.ndarray, "n 4"]
    """Clipped to the image; NaN where the object does not exist."""
    exists: Bool[np.ndarray, "n"]
    benchmark: str = "folder"

    def __len__(self) -> int:
        return len(self.frames)
