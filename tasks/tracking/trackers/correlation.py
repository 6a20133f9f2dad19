"""Normalised cross-correlation of grey pixels: the object as a picture that does not change.

    ncc(u) = <T - mean T, S_u - mean S_u> / (|T - mean T| |S_u - mean S_u|)      in -1 .. 1
    box    = argmax over u of (1 - w) ncc(u) + w Hann(u),                        w = 0.3

`T` is the object in the first frame and `S_u` a window of the same size, `u` within
0.75 (width + height) of the last place, in whole pixels; the size stays. Lewis 1995, "Fast
normalized cross-correlation".
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike

from tasks.tracking.trackers.base import Box, Frame, Output, checked_box
from visionlora.errors import AdapterStateError

REACH = 0.75
"""How far the object is searched on each side, in shares of its width + height."""
WINDOW = 0.3
"""Share of the window in the penalised score."""
SMALLEST = 2
"""Pixels of a template; one pixel has no contrast that could be normalised."""


@dataclass(eq=False)
class _State:
    template: UInt8[np.ndarray, "h w"]
    box: Box


class Correlation:
    """Follows the grey pixels of the first box."""

    name = "ncc"

    def __init__(self) -> None:
        self._state: _State | None = None

    def init(self, image: Frame, box: ArrayLike) -> None:
        """Cut out the object; see `Tracker`."""
        found = checked_box(box, image)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = (max(SMALLEST, round(side)) for side in (found[3], found[2]))
        self._state = _State(_patch(grey, *_corner(found), height, width), found)

    def track(self, image: Frame) -> Output:
        """Return the best place of the same size; see `Tracker`."""
        state = self._state
        if state is None:
            raise AdapterStateError("a tracker needs init(image, box) before track(image)")
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = state.template.shape
        reach = round(REACH * (height + width))
        top, left = _corner(state.box)
        around = _patch(grey, top - reach, left - reach, height + 2 * reach, width + 2 * reach)
        score = cv2.matchTemplate(around, state.template, cv2.TM_CCOEFF_NORMED)
        score = np.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0).clip(-1, 1)
        penalised = (1 - WINDOW) * score + WINDOW * _hann(2 * reach + 1)
        row, column = np.unravel_index(int(penalised.argmax()), score.shape)
        moved = state.box + np.array([column - reach, row - reach, 0.0, 0.0])
        # The object stays where it can be seen, or it would never be found again.
        limits = np.array([image.shape[1] - 1.0, image.shape[0] - 1.0])
        moved[:2] = np.clip(moved[:2], 1.0 - moved[2:], limits)
        state.box = moved
        return Output(np.array(moved), float(score[row, column]))


def _corner(box: Box) -> tuple[int, int]:
    """Return row and column of the pixel where a box begins."""
    return round(float(box[1])), round(float(box[0]))


def _patch(
    grey: UInt8[np.ndarray, "rows columns"], top: int, left: int, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width}"]:
    """Return a part of a frame; beyond its border the border is repeated."""
    rows = np.clip(np.arange(top, top + height), 0, grey.shape[0] - 1)
    columns = np.clip(np.arange(left, left + width), 0, grey.shape[1] - 1)
    return np.ascontiguousarray(grey[np.ix_(rows, columns)])


def _hann(side: int) -> Float[np.ndarray, "{side} {side}"]:
    return np.outer(np.hanning(side), np.hanning(side))
