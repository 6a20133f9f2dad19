"""Noise: Gaussian of any strength, or that of counted photons; sometimes the same in all channels.

    Gaussian   y = x + n,  n ~ N(0, (sigma / 255)^2),  sigma in U(0, 50)
    Poisson    y = Poisson(v x) / v,  v = 10^u,  u in U(2, 4)

In 40 % of the draws one grey map of noise is shared by the channels. PROD (Park et al. 2024, arXiv
2408.01099) has noise among its functions; ranges are derived, the paper's are not known.
"""

import numpy as np

from tasks.restoration.degradations.base import Drawn, Image, rounded

SIGMA = (0.0, 50.0)
PHOTONS = (2.0, 4.0)
GAUSSIAN, GREY = 0.5, 0.4
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def noise(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Add noise of a random kind and strength."""
    grey = bool(rng.random() < GREY)
    if rng.random() < GAUSSIAN:
        sigma = rng.uniform(*SIGMA)
        drawn: Drawn = {"kind": "gaussian", "sigma": rounded(sigma), "grey": grey}
        return gaussian_noise(image, sigma, rng, grey=grey), drawn
    photons = 10 ** rng.uniform(*PHOTONS)
    drawn = {"kind": "poisson", "photons": rounded(photons), "grey": grey}
    if grey:
        light = (image @ LUMA)[..., None]
        return image + (_counted(light, photons, rng) - light), drawn
    return _counted(image, photons, rng), drawn


def gaussian_noise(
    image: Image, sigma: float, rng: np.random.Generator, *, grey: bool = False
) -> Image:
    """Add Gaussian noise of a deviation out of 255, not clamped."""
    shape = (*image.shape[:2], 1) if grey else image.shape
    return image + rng.standard_normal(shape, np.float32) * np.float32(sigma / 255)


def _counted(light: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return (rng.poisson(np.clip(light, 0, None) * photons) / photons).astype(np.float32)
