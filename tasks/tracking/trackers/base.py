"""What a tracker is: `init` with the first frame and its box, then `track` frame after frame.

    tracker = load_tracker("tiny")
    tracker.init(frame, (x, y, w, h))
    box, score = tracker.track(next_frame)

Frames are RGB `(height, width, 3)` of bytes. Boxes are `x, y, w, h` in pixels, where `x = 0` is the
left edge of the first pixel and need not be whole. A tracker follows one object; another `init`
starts over.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from tasks.tracking.images import Frame
from visionlora.errors import DataError

__all__ = ["Counts", "Frame", "LockstepTracker", "Output", "Tracker", "checked_box"]

Box = Float64[np.ndarray, "4"]


class Output(NamedTuple):
    """Where a tracker sees the object, and how sure it is."""

    box: Box
    """x, y, w, h."""
    score: float


class Counts(NamedTuple):
    """Numbers of parameters, before adapters are merged."""

    trainable: int
    total: int


class Tracker(Protocol):
    """Follows one object."""

    name: str

    def init(self, image: Frame, box: ArrayLike) -> None:
        """Start on the object in `box`.

        Raises:
            DataError: the box has no size or lies outside the image.
        """
        ...

    def track(self, image: Frame) -> Output:
        """Find the object in the frame after the last one."""
        ...


class LockstepTracker(Tracker, Protocol):
    """A tracker that can advance several objects, each in its own sequence, in one batch.

    A slot is all that it remembers of one object. Its content belongs to the tracker.
    """

    def start(self, image: Frame, box: ArrayLike) -> object:
        """Return the slot of a new object."""
        ...

    def advance(self, slots: Sequence[object], images: Sequence[Frame]) -> list[Output]:
        """Advance every slot by one frame; what comes out does not depend on the other slots."""
        ...


def checked_box(box: ArrayLike, image: Frame) -> Box:
    """Return the first box as an array.

    Raises:
        DataError: the image is no `Frame`; the box is not four finite numbers, has no size, or lies
            outside the image.
    """
    shape, kind = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or len(shape) != 3 or shape[2] != 3 or kind != np.uint8:
        given = type(image).__name__ if shape is None else f"shape {tuple(shape)} and {kind}"
        raise DataError(f"a frame is an RGB array (height, width, 3) of uint8; got {given}")
    try:
        found = np.asarray(box, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"a box is four numbers x, y, w, h; got {box!r}") from None
    if found.shape != (4,) or not np.isfinite(found).all():
        raise DataError(f"a box is four finite numbers x, y, w, h; got {found.tolist()}")
    x, y, w, h = found.tolist()
    if w <= 0 or h <= 0:
        raise DataError(f"the box has no size: w {w:g}, h {h:g}")
    height, width = image.shape[:2]
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise DataError(
            f"the box x {x:g}, y {y:g}, w {w:g}, h {h:g} lies outside the image of "
            f"{width} x {height} pixels"
        )
    return found
