"""Turning a photograph the way its camera says it is to be seen.

Cameras store rows as the sensor has them, and a number from 1 to 8 in the EXIF data (tag 0x0112)
that tells viewers what to do. A restored picture is written without it, hence as it is seen.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from tasks.restoration.images import Picture

TAG = 0x0112
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}
"""Quarter turns to the left, and whether left and right are exchanged after them."""


def upright(picture: Picture, path: Path) -> Picture:
    """Return a picture as it is to be seen.

    Args:
        picture: as it is stored.
        path: its file, in which the number is.
    """
    turns, mirrored = TURNS.get(_number(path), (0, False))

    def turned(values: np.ndarray) -> np.ndarray:
        values = np.rot90(values, turns)
        return np.ascontiguousarray(values[:, ::-1] if mirrored else values)

    alpha = None if picture.alpha is None else turned(picture.alpha)
    return Picture(turned(picture.levels), alpha, picture.grey)


def _number(path: Path) -> int:
    """Return the number in a file; 1, for nothing to do, where none can be read."""
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(TAG, 1))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return 1
