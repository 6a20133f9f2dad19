"""The first box for ever: what any tracker has to beat."""

import numpy as np
from numpy.typing import ArrayLike

from tasks.tracking.trackers.base import Box, Frame, Output, checked_box
from visionlora.errors import AdapterStateError


class Static:
    """Never moves."""

    name = "static"

    def __init__(self) -> None:
        self._box: Box | None = None

    def init(self, image: Frame, box: ArrayLike) -> None:
        """Keep the box; see `Tracker`."""
        self._box = checked_box(box, image)

    def track(self, image: Frame) -> Output:
        """Return the box of the first frame; see `Tracker`."""
        if self._box is None:
            raise AdapterStateError("a tracker needs init(image, box) before track(image)")
        return Output(np.array(self._box), 1.0)
