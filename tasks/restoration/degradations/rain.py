"""Rain streaks, blended like light on a screen.

    y = x + R (1 - x),   R = a clamp(g (S * L), 0, 1),   g = length of L

S is a map of drops, Bernoulli; L a line of U(9, 45) px within 30 degrees of the vertical, softened
by a Gaussian of U(.3, 1); a in U(.3, .9). Drops are as dense as makes the streaks, density times
length, cover U(.02, .2) of the picture. R is the same in all channels.
PROD (Park et al. 2024, arXiv 2408.01099) has rain among its functions; this model and its ranges
are derived, the paper's are not known. Lengths are for patches of 256 px.
"""

import math

import cv2
import numpy as np

from tasks.restoration.degradations.base import Drawn, Image, rounded
from tasks.restoration.degradations.blur import path

COVER = (0.02, 0.2)
LENGTH = (9.0, 45.0)
SLANT = math.radians(30)
SOFT = (0.3, 1.0)
OPACITY = (0.3, 0.9)


def rain(image: Image, rng: np.random.Generator, scale: float = 1.0) -> tuple[Image, Drawn]:
    """Let it rain."""
    cover, soft, opacity = (rng.uniform(*limits) for limits in (COVER, SOFT, OPACITY))
    length = max(3.0, rng.uniform(*LENGTH) * scale)
    slant = rng.uniform(-SLANT, SLANT)
    streaks = _streaks(image.shape[:2], cover / length, length, slant, soft, rng)
    layer = np.float32(opacity) * streaks[..., None]
    drawn = {
        "cover": rounded(cover),
        "length": rounded(length),
        "slant": rounded(math.degrees(slant)),
        "opacity": rounded(opacity),
    }
    return image + layer * (1 - image), drawn


def _streaks(
    size: tuple[int, ...],
    density: float,
    length: float,
    slant: float,
    soft: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the map of streaks in [0, 1]; those of drops beyond the picture reach into it."""
    margin = math.ceil(length / 2)
    drops = rng.random((size[0] + 2 * margin, size[1] + 2 * margin), np.float32) < density
    line = path(length, math.pi / 2 + slant, 0.0, rng)
    line = cv2.GaussianBlur(np.pad(line, 2), (5, 5), soft)
    streaks = cv2.filter2D(drops.astype(np.float32), -1, line) * length
    return np.asarray(streaks[margin:-margin, margin:-margin].clip(0, 1))
