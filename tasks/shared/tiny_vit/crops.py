"""Square crops of photographs, as a tracker sees the world: any scale, light, and sharpness.

A crop is a pure function of (seed, number): a resumed run sees the crops it would have seen. The
window is up to three times smaller than the crop, since search regions of small objects are
enlarged, and as large as the photograph. Teacher and student see the same altered pixels.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance
from torch import Tensor

from tasks.shared.tiny_vit.photographs import Photographs

ENLARGED = 3.0
"""How much a window is enlarged at most."""
TRIES, DETAIL = 4, 24.0
"""Windows drawn at most for one whose brightness deviates by so much, of 255: much of a wallpaper
is sky."""
STRETCH = 0.2
"""Range of the logarithm of a crop's aspect ratio."""
GREY, POOR, JITTER = 0.15, 0.3, 0.4
"""Shares of grey and of badly compressed crops; range of brightness, contrast and saturation."""


class Crops:
    """Draws crops.

    Args:
        photographs: where they are cut from, in proportion to the root of the area.
    """

    def __init__(self, photographs: Photographs, seed: int = 0) -> None:
        self.photographs = photographs
        self.seed = seed
        area = np.array([entry.height * entry.width for entry in photographs.entries], float)
        self._share = np.cumsum(np.sqrt(area)) / np.sqrt(area).sum()

    def batch(self, numbers: Sequence[int], side: int) -> Float[Tensor, "b 3 s s"]:
        """Return crops of `side` pixels with values in 0 .. 1."""
        pixels = np.stack([self.crop(number, side) for number in numbers])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)

    def crop(self, number: int, side: int) -> UInt8[np.ndarray, "s s 3"]:
        """Return one crop."""
        rng = np.random.default_rng((self.seed, number))
        chosen = int(np.searchsorted(self._share, rng.random()))
        picture = self.photographs[min(chosen, len(self.photographs) - 1)]
        image = altered(self._window(picture, side, rng), rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def _window(
        self, picture: UInt8[np.ndarray, "h w 3"], side: int, rng: np.random.Generator
    ) -> Image.Image:
        """Return a random window, resized to the crop; one with something on it if one is found."""
        for _ in range(TRIES):
            window = _cut(picture, side, rng)
            steps = tuple(max(1, n // 16) for n in window.shape[:2])
            if window[:: steps[0], :: steps[1]].mean(axis=-1).std() > DETAIL:
                break
        # Twice the pixels that are needed are enough to resize from.
        step = max(1, min(window.shape[:2]) // (2 * side))
        image = Image.fromarray(np.ascontiguousarray(window[::step, ::step]))
        return image.resize((side, side), Image.Resampling.BILINEAR)


def _cut(
    picture: UInt8[np.ndarray, "h w 3"], side: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width = picture.shape[:2]
    most = min(height, width)
    size = math.exp(rng.uniform(math.log(min(side / ENLARGED, most)), math.log(most)))
    aspect = math.exp(rng.uniform(-STRETCH, STRETCH))
    rows = int(np.clip(size * aspect, 8, height))
    columns = int(np.clip(size / aspect, 8, width))
    top = int(rng.integers(0, height - rows + 1))
    left = int(rng.integers(0, width - columns + 1))
    return picture[top : top + rows, left : left + columns]


def altered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the picture in another light, perhaps grey, perhaps badly compressed."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    if rng.random() < GREY:
        image = image.convert("L").convert("RGB")
    if rng.random() < POOR:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(20, 90)))
        image = Image.open(stream).convert("RGB")
    return image
