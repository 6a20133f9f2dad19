"""Shapes, patches and cameras: the drawing that synthetic pairs are made of.

Coordinates are continuous, pixel 0 spans [0, 1); OpenCV puts its centre at 0, hence the halves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tasks.tracking.boxes import Boxes
from tasks.tracking.images import Frame

Vector = Float[np.ndarray, "2"]
Matrix = Float[np.ndarray, "2 3"]
"""The affine map `u = M[:, :2] x + M[:, 2]`."""
Outline = Float[np.ndarray, "points 2"]

POINTS = 40
SOFTNESS = 0.7
"""Standard deviation, in pixels, of the blur of an edge."""
FINE = 4
"""Shapes are filled on a grid so much finer, because OpenCV fills every pixel that it touches."""
_ANGLES = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_WAVES = np.arange(2, 6)


class Thing(NamedTuple):
    """A patch and the shape it is cut to, both over the square [-1/2, 1/2]^2."""

    texture: UInt8[np.ndarray, "side side 3"]
    outline: Outline


def draw_outline(rng: np.random.Generator) -> Outline:
    """Draw a shape between ellipse and rectangle, its radius bent by some waves."""
    power = rng.choice([2.0, 3.0, 8.0])
    radius = (np.abs(_CIRCLE) ** power).sum(axis=1) ** (-1 / power)
    return fitted(_CIRCLE * (radius * _waves(rng, 0.25))[:, None])


def bent(outline: Outline, rng: np.random.Generator) -> Outline:
    """Return the shape after a small change of its own."""
    return fitted(outline * _waves(rng, 0.06)[:, None])


def fitted(points: Outline) -> Outline:
    """Return a shape moved and stretched to touch all sides of [-1/2, 1/2]^2."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / (high - low) - 0.5


def _waves(rng: np.random.Generator, strength: float) -> Float[np.ndarray, "points"]:
    heights = strength * rng.uniform(-1, 1, len(_WAVES)) / np.sqrt(_WAVES)
    phases = rng.uniform(0, 2 * np.pi, len(_WAVES))
    return 1 + np.cos(_WAVES * _ANGLES[:, None] + phases) @ heights


def pose(size: Vector, centre: Vector, angle: float = 0.0, shear: float = 0.0) -> Matrix:
    """Return the map from the unit square to a frame."""
    sheared = np.array([[size[0], shear * size[1]], [0.0, size[1]]])
    return affine(_turn(angle) @ sheared, centre)


def hull(outline: Outline, matrix: Matrix) -> Boxes:
    """Return the `xyxy` box around a mapped shape."""
    points = outline @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def paste(frame: Frame, thing: Thing, matrix: Matrix) -> None:
    """Paint a thing into a frame, in place."""
    margin = 2
    points = thing.outline @ matrix[:, :2].T + matrix[:, 2]
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    x, y = max(int(left) - margin, 0), max(int(top) - margin, 0)
    width = min(int(right) + margin, frame.shape[1]) - x
    height = min(int(bottom) + margin, frame.shape[0]) - y
    if min(width, height) < 1:
        return
    mask = np.zeros((height * FINE, width * FINE), np.uint8)
    cv2.fillPoly(mask, np.rint((points - [x, y]) * FINE - 0.5).astype(np.int32)[None], 255)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)
    alpha = cv2.GaussianBlur(mask, (5, 5), SOFTNESS)[..., None] * np.float32(1 / 255)

    side = thing.texture.shape[0]
    turn = matrix[:, :2] / side
    offset = matrix[:, 2] + (turn * (0.5 - side / 2)).sum(axis=1) - [x + 0.5, y + 0.5]
    patch = cv2.warpAffine(
        thing.texture, affine(turn, offset), (width, height), borderMode=cv2.BORDER_REFLECT_101
    )
    under = frame[y : y + height, x : x + width]
    under[:] = under + (patch.astype(np.float32) - under) * alpha + np.float32(0.5)


@dataclass(frozen=True)
class Look:
    """A camera over a photograph: what is at `centre` is seen at `at`, `scale` px per px."""

    photo: Frame
    centre: Vector
    at: Vector
    scale: float
    angle: float = 0.0

    @property
    def matrix(self) -> Matrix:
        """From photograph to frame."""
        turn = self.scale * _turn(self.angle)
        return affine(turn, self.at - turn @ self.centre)

    def frame(self, side: int) -> Frame:
        """Return what the camera sees; beyond the photograph it is mirrored."""
        matrix = self.matrix
        matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
        return np.asarray(
            cv2.warpAffine(self.photo, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        )


def affine(linear: Float[np.ndarray, "2 2"], offset: Vector) -> Matrix:
    """Return a map from its two parts."""
    matrix = np.empty((2, 3))
    matrix[:, :2], matrix[:, 2] = linear, offset
    return matrix


def _turn(angle: float) -> Float[np.ndarray, "2 2"]:
    sine, cosine = np.sin(angle), np.cos(angle)
    return np.array([[cosine, -sine], [sine, cosine]])
