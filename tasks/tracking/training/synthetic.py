"""Pairs cut from photographs: what a tracker trains on where there is no video.

    in place    the object is a rectangle of a photograph; template and search are two looks at it
    pasted      the object is a patch of one photograph in a random soft-edged shape, put over
                another one, or over another place of it

Between the two views the camera moves and turns; a pasted object also moves, grows, turns, bends
and changes colour by itself. Around it are distractors: patches of other places, and some of the
object's own texture in another shape, so that neither pasted edges nor colours alone say which one
it is. Some search frames are blurred, coarse or noisy, or have something in front of the object.

Lengths are in units of the side that an object has in a search crop, so frames are cut about as
large as the crops taken from them. Jitter and augmentation come after, as for real frames. The
recipe is this project's own.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from tasks.tracking.boxes import Boxes, clip
from tasks.tracking.images import Frame
from tasks.tracking.training.pairs import Pair, View
from tasks.tracking.training.paste import (
    Look,
    Matrix,
    Outline,
    Thing,
    Vector,
    affine,
    bent,
    draw_outline,
    hull,
    paste,
    pose,
)
from tasks.tracking.training.photographs import Photographs

IN_PLACE = 0.3
"""Share of pairs whose object belongs to the photograph."""
SAME_SCENE = 0.6
"""Share of the other pairs whose search shows the place of the template."""
SIMILAR = 0.35
"""Share of distractors with the object's texture."""
OCCLUDED = 0.15
MOST_DISTRACTORS = 3
TEMPLATE_SIDE, SEARCH_SIDE = 3.5, 7.0
"""Sides of the frames, in units."""
LEAST_CONTRAST = 12.0
"""Deviation of the levels of every channel below which a patch is too plain to be followed."""
SIZE, ASPECT = 0.2, 0.6
"""Deviations of the logarithms of an object's side and of its width by height: people stand and
cars lie, and a tracker that has seen only squares draws squares around both."""
PARTS = 0.5
"""Share of things put together from two or three materials, as people and cars are: the box is
that of all of them."""
TRIES = 6
OUTLINES = 512
TEXTURE = 48
"""Side of a patch, in pixels."""
_SQUARE = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


class SyntheticPairs:
    """Draws pairs from photographs.

    Args:
        photographs: where patches and backgrounds come from.
        unit: side of an object in the search crop, in pixels (`search_px / search_factor`).
    """

    name = "synthetic"

    def __init__(self, photographs: Photographs, unit: float) -> None:
        self.photographs = photographs
        self.unit = unit
        self.notes = photographs.notes
        # Drawing a shape takes as long as painting it.
        shapes = np.random.default_rng(0)
        self._outlines = [draw_outline(shapes) for _ in range(OUTLINES)]

    def pair(self, rng: np.random.Generator) -> Pair:
        """Draw a pair."""
        size = self._size(rng)
        pasted = rng.random() >= IN_PLACE
        looks = self._looks(size, pasted, rng)
        sides = (TEMPLATE_SIDE, SEARCH_SIDE)
        frames = [look.frame(round(self.unit * s)) for look, s in zip(looks, sides, strict=True)]
        if pasted:
            things, matrices = self._object(size, rng)
        else:
            things, matrices = [], [_over(look, looks[0], size) for look in looks]
        outline = [thing.outline for thing in things] or [_SQUARE, _SQUARE]
        boxes = [hull(o, matrix) for o, matrix in zip(outline, matrices, strict=True)]

        for _ in range(rng.integers(MOST_DISTRACTORS + 1)):
            other = self._distractor(things, rng)
            for frame, box in zip(frames, boxes, strict=True):
                self._put_beside(frame, box, other, rng)
        for frame, thing, matrix in zip(frames, things, matrices, strict=False):
            paste(frame, thing, matrix)
        if rng.random() < OCCLUDED:
            self._put_in_front(frames[1], boxes[1], rng)
        views = [
            View(_lit(frame, rng), clip(box, frame.shape[1], frame.shape[0]))
            for frame, box in zip(frames, boxes, strict=True)
        ]
        return Pair(views[0], View(_degraded(views[1].image, rng), views[1].box))

    def _size(self, rng: np.random.Generator) -> Vector:
        """Draw width and height of the object in the template."""
        side, aspect = rng.normal(0, [SIZE, ASPECT])
        return self.unit * np.exp([side + aspect / 2, side - aspect / 2])

    def _looks(self, size: Vector, pasted: bool, rng: np.random.Generator) -> Sequence[Look]:
        """Draw where the two cameras look; in place, the object is at their `centre`."""
        scale = rng.uniform(0.7, 1.4)
        photo, centre = self._place(size / scale, rng)
        at = np.full(2, TEMPLATE_SIDE * self.unit / 2)
        first = Look(photo, centre, at, scale)
        at = SEARCH_SIDE * self.unit * rng.uniform(0.35, 0.65, 2)
        if pasted and rng.random() >= SAME_SCENE:
            photo, centre = self._place(size / scale, rng)
        zoom = float(scale * np.exp(rng.normal(0, 0.2)))
        return first, Look(photo, centre, at, zoom, float(rng.normal(0, 0.08)))

    def _object(self, size: Vector, rng: np.random.Generator) -> tuple[list[Thing], list[Matrix]]:
        """Draw an object as it is in the template and, changed, in the search."""
        thing = self._thing(rng)
        later = Thing(_tinted(thing.texture, 0.12, 12, rng), bent(thing.outline, rng))
        grown = size * np.exp(rng.normal(0, 0.15) + rng.normal(0, 0.08, 2))
        start = self.unit * (TEMPLATE_SIDE / 2 + rng.normal(0, 0.1, 2))
        end = SEARCH_SIDE * self.unit * rng.uniform(0.35, 0.65, 2)
        turn, shear = rng.normal(0, [0.2, 0.08])
        return [thing, later], [pose(size, start), pose(grown, end, turn, shear)]

    def _thing(self, rng: np.random.Generator) -> Thing:
        texture = self._texture(rng)
        for _ in range(int(rng.integers(1, 3)) if rng.random() < PARTS else 0):
            border = int(rng.uniform(0.25, 0.75) * TEXTURE)
            part = (
                (slice(border), slice(None)) if rng.random() < 0.5 else (slice(None), slice(border))
            )
            texture[part] = self._texture(rng)[part]
        return Thing(texture, self._outline(rng))

    def _texture(self, rng: np.random.Generator) -> Frame:
        """Draw a patch of a photograph."""
        side = rng.uniform(0.6, 1.6) * TEXTURE
        photo, centre = self._place(np.full(2, side), rng)
        middle = np.full(2, TEXTURE / 2)
        return Look(photo, centre, middle, TEXTURE / side).frame(TEXTURE)

    def _outline(self, rng: np.random.Generator) -> Outline:
        return self._outlines[int(rng.integers(OUTLINES))]

    def _distractor(self, things: Sequence[Thing], rng: np.random.Generator) -> Thing:
        """Draw another thing, sometimes of the object's texture."""
        if things and rng.random() < SIMILAR:
            turned = np.rot90(things[0].texture, int(rng.integers(4)))
            return Thing(_tinted(turned, 0.2, 20, rng), self._outline(rng))
        return self._thing(rng)

    def _put_beside(self, frame: Frame, box: Boxes, thing: Thing, rng: np.random.Generator) -> None:
        """Paint a thing somewhere around the object, covering at most little of it."""
        size = self.unit * np.exp(rng.normal(0, 0.3, 2))
        clear = (box[2:] - box[:2] + size) / 2 * 0.9
        direction = rng.uniform(-1, 1, 2)
        direction /= np.abs(direction).max()
        away = direction * (clear + rng.uniform(0, 1.5) * self.unit)
        paste(frame, thing, pose(size, (box[:2] + box[2:]) / 2 + away, rng.normal(0, 0.3)))

    def _put_in_front(self, frame: Frame, box: Boxes, rng: np.random.Generator) -> None:
        """Paint a bar or a thing over a side of the object, less than half of it."""
        extent = box[2:] - box[:2]
        size = extent * rng.uniform(0.3, 0.8, 2)
        away = extent * 0.5 * rng.choice([-1, 1], 2)
        centre = (box[:2] + box[2:]) / 2 + away
        paste(frame, self._thing(rng), pose(size, centre, rng.normal(0, 0.3)))

    def _place(self, size: Vector, rng: np.random.Generator) -> tuple[Frame, Vector]:
        """Draw a photograph at some size, and a point in it around which it is not plain."""
        for _ in range(TRIES):
            levels = self.photographs.pyramids[int(rng.integers(len(self.photographs)))]
            photo = levels[int(rng.integers(len(levels)))]
            limit = np.array(photo.shape[1::-1], dtype=np.float64)
            half = np.minimum(size, limit) / 2
            centre = half + rng.random(2) * (limit - 2 * half)
            (x1, y1), (x2, y2) = (centre - half).astype(int), np.ceil(centre + half).astype(int)
            deviation = cv2.meanStdDev(photo[y1:y2, x1:x2])[1]
            if deviation.max() >= LEAST_CONTRAST:
                break
        return photo, centre


def _over(look: Look, first: Look, size: Vector) -> Matrix:
    """Return the map of the unit square over the object that `first` sees with this size."""
    within = pose(size / first.scale, first.centre)
    matrix = look.matrix
    return affine(matrix[:, :2] @ within[:, :2], matrix[:, :2] @ within[:, 2] + matrix[:, 2])


def _tinted(image: Frame, gain: float, offset: float, rng: np.random.Generator) -> Frame:
    """Change brightness and colour balance."""
    gains = np.exp(rng.normal(0, gain) + rng.normal(0, gain / 2, 3))
    matrix = np.hstack([np.diag(gains), np.full((3, 1), rng.normal(0, offset))])
    return np.asarray(cv2.transform(np.ascontiguousarray(image), matrix))


def _lit(frame: Frame, rng: np.random.Generator) -> Frame:
    """Give a frame its own light."""
    return _tinted(frame, 0.08, 6, rng)


def _degraded(frame: Frame, rng: np.random.Generator) -> Frame:
    """Blur, coarsen or compress some frames."""
    kind, strength = rng.choice(4, p=[0.6, 0.15, 0.15, 0.1]), rng.random()
    if kind == 1:  # motion: the mean along a line
        length = 3 + 2 * int(4 * strength)
        line = cv2.getRotationMatrix2D(((length - 1) / 2,) * 2, 180 * rng.random(), 1)
        kernel = np.zeros((length, length), np.float32)
        kernel[length // 2] = 1
        turned = np.asarray(cv2.warpAffine(kernel, line, (length, length)))
        return np.asarray(cv2.filter2D(frame, -1, turned / turned.sum()))
    if kind == 2:
        small = max(8, int(frame.shape[0] * (0.35 + 0.4 * strength)))
        coarse = cv2.resize(frame, (small, small), interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(coarse, frame.shape[1::-1]))
    if kind == 3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(25 + 50 * strength)]
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", frame, quality)[1], cv2.IMREAD_COLOR))
    return frame
