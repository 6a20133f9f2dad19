"""How the two crops of a training pair are varied, in this order.

    flip      left to right with probability 1/2, each crop by itself, the box with it
    colour    brightness, contrast and saturation, each by a factor U(.6, 1.4), in random order,
              each crop by itself
    one of    greyscale | solarise from 128 on | Gaussian blur, standard deviation U(.1, 2):
              exactly one, the same for both crops

The third step is the 3-Augment of DeiT III (Touvron et al. 2022, arXiv:2204.07118), and works on 8
bits. albumentations draws it once for both crops (`additional_targets`). Its greyscale and
solarise are those of Pillow up to one level; its blur is a true Gaussian, where Pillow runs three
box filters. Its colour jitter rounds to 8 bits after every factor, and its flip is one indexing,
so these two are written out.

Order and figures: LoRAT, 2024, arXiv:2403.05231.
"""

import os
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tasks.tracking.boxes import clip
from visionlora.errors import ConfigError

FLIP = 0.5
JITTER = 0.4
THRESHOLD = 128 / 255
RADIUS = (0.1, 2.0)
LUMA = np.array([0.2989, 0.587, 0.114], dtype=np.float32)


class Crop(NamedTuple):
    """The pixels of a crop, 0..255, and the `xyxy` box in it."""

    pixels: Float[np.ndarray, "side side 3"]
    box: Float[np.ndarray, "4"]


class Augmented(NamedTuple):
    """The same after augmentation, in 8 bits, the box clipped to the crop."""

    pixels: UInt8[np.ndarray, "side side 3"]
    box: Float[np.ndarray, "4"]


class Augmentation:
    """Varies pairs of crops.

    Args:
        third: share of the pairs that get the third step; LoRAT gives it to all.
    """

    def __init__(self, third: float = 1.0) -> None:
        self.third = third
        self._one_of = _one_of_three()

    def __call__(
        self, template: Crop, search: Crop, rng: np.random.Generator
    ) -> tuple[Augmented, Augmented]:
        """Return both crops varied, by draws from `rng` only."""
        crops = [flip(crop) if rng.random() < FLIP else crop for crop in (template, search)]
        coloured = [jitter_colour(crop.pixels / 255, rng) for crop in crops]
        images = [(pixels * 255).astype(np.uint8) for pixels in coloured]
        if rng.random() < self.third:
            self._one_of.set_random_seed(int(rng.integers(2**31)))
            varied = self._one_of(image=images[0], search=images[1])
            images = [varied["image"], varied["search"]]
        return _clipped(images[0], crops[0].box), _clipped(images[1], crops[1].box)


def as_they_are(template: Crop, search: Crop) -> tuple[Augmented, Augmented]:
    """Return both crops without any change."""
    one, two = (_clipped(crop.pixels.astype(np.uint8), crop.box) for crop in (template, search))
    return one, two


def _clipped(pixels: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> Augmented:
    return Augmented(pixels, clip(box, pixels.shape[1], pixels.shape[0]))


def _one_of_three() -> Any:
    """Return the third step, for `image` and `search`."""
    # Importing it would ask a package index for news otherwise; it takes a second as it is.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations as A
    except ModuleNotFoundError as error:
        raise ConfigError(
            "training augments with albumentations: pip install 'visionlora[tracking]'"
        ) from error

    steps = [
        A.ToGray(method="weighted_average", p=1),
        A.Solarize(threshold_range=(THRESHOLD, THRESHOLD), p=1),
        A.GaussianBlur(blur_limit=0, sigma_limit=RADIUS, p=1),
    ]
    targets = {"search": "image"}
    return A.Compose([A.OneOf(steps, p=1)], additional_targets=targets, is_check_shapes=False)


def flip(crop: Crop) -> Crop:
    """Mirror a crop left to right, and its box with it."""
    width = crop.pixels.shape[1]
    x1, y1, x2, y2 = crop.box
    return Crop(crop.pixels[:, ::-1], np.array([width - x2, y1, width - x1, y2]))


def jitter_colour(
    pixels: Float[np.ndarray, "h w 3"], rng: np.random.Generator
) -> Float[np.ndarray, "h w 3"]:
    """Change brightness, contrast and saturation of values in [0, 1], in random order."""
    changes = (_brightness, _contrast, _saturation)
    order = rng.permutation(len(changes))
    factors = rng.uniform(1 - JITTER, 1 + JITTER, len(changes)).astype(np.float32)
    for which in order:
        pixels = changes[which](pixels, factors[which])
        np.clip(pixels, 0.0, 1.0, out=pixels)
    return pixels


def _brightness(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    return pixels * factor


def _contrast(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    """Blend with the mean of the grey image."""
    grey = np.array(cv2.mean(pixels)[:3], np.float32)  # forty times as fast as numpy over two axes
    return pixels * factor + (1 - factor) * (grey @ LUMA)


def _saturation(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    """Blend with the grey image."""
    mix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * LUMA
    return cv2.transform(pixels, mix)
