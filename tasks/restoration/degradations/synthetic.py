"""Degradations that stand for a task where there are clean pictures only.

    denoise    y = x + N(0, (25 / 255)^2), not clamped, as in Restormer's evaluation
    derain     streaks, see rain.py
    deblur     motion blur, see blur.py
    dehaze     y = x t + A (1 - t),  t = exp(-beta d),  beta in U(.8, 2.4), A in U(.7, 1)
               (Koschmieder's law); the depth d in [0, 1] is smooth and random, larger at the top
    lowlight   y = noisy(c x^g),  g in U(1.5, 3), c in U(.2, .6); Poisson and Gaussian noise
    jpeg       quality 10, see jpeg.py
    sr         bicubic to a fourth and back; the smaller picture is taken with antialiasing

All but `denoise` stay in [0, 1]. All but its noise model are stand-ins of this project for pairs
that users have.
"""

import cv2
import numpy as np

from tasks.restoration.degradations.base import Degradation, Drawn, Image, rounded
from tasks.restoration.degradations.blur import motion
from tasks.restoration.degradations.jpeg import compressed
from tasks.restoration.degradations.noise import gaussian_noise
from tasks.restoration.degradations.rain import rain

SIGMA, QUALITY, FACTOR = 25.0, 10, 4
COARSE = 4
"""Points of the random depth along each side."""


def denoise(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Add Gaussian noise of one strength."""
    return gaussian_noise(image, SIGMA, rng), {"sigma": SIGMA}


def dehaze(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Put haze between camera and scene."""
    height, width = image.shape[:2]
    coarse = rng.random((COARSE, COARSE), np.float32) * 0.5
    coarse += np.linspace(0.5, 0, COARSE, dtype=np.float32)[:, None]
    depth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    beta, air = rng.uniform(0.8, 2.4), rng.uniform(0.7, 1.0)
    through = np.exp(-np.float32(beta) * depth)[..., None]
    hazy = image * through + np.float32(air) * (1 - through)
    return hazy, {"beta": rounded(beta), "air": rounded(air)}


def lowlight(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Take light away, and count what is left."""
    gamma, gain = rng.uniform(1.5, 3.0), rng.uniform(0.2, 0.6)
    dark = np.float32(gain) * image ** np.float32(gamma)
    counted = (rng.poisson(dark * 1000) / 1000).astype(np.float32)
    noisy = gaussian_noise(counted, 2.0, rng)
    return noisy.clip(0, 1), {"gamma": rounded(gamma), "gain": rounded(gain)}


def compress(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Compress with one quality."""
    return compressed(image, QUALITY), {"quality": QUALITY}


def coarsen(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Make a picture small and large again."""
    from PIL import Image as Pillow

    height, width = image.shape[:2]
    small = (max(1, round(width / FACTOR)), max(1, round(height / FACTOR)))
    channels = []
    for channel in np.moveaxis(image, 2, 0):  # Pillow antialiases, OpenCV's bicubic does not
        less = Pillow.fromarray(np.ascontiguousarray(channel)).resize(
            small, Pillow.Resampling.BICUBIC
        )
        channels.append(np.asarray(less.resize((width, height), Pillow.Resampling.BICUBIC)))
    return np.stack(channels, axis=2).clip(0, 1), {"factor": FACTOR}


TASKS: dict[str, Degradation] = {
    "denoise": denoise,
    "derain": rain,
    "dehaze": dehaze,
    "deblur": motion,
    "lowlight": lowlight,
    "jpeg": compress,
    "sr": coarsen,
}
