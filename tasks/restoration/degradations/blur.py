"""Blur out of focus and blur by motion: a convolution with a kernel that sums to 1.

    blur     Gaussian, odd side min(21, 2 ceil(3 sigma) + 1); 70 % isotropic, sigma in U(.2, 3);
             30 % with a sigma along each of two axes, turned by U(-pi, pi)
    motion   a line of length U(3, 25) px at an angle U(0, pi); every second one is a random walk of
             that length instead, its heading changing by N(0, .2) a pixel, centred

Pictures are mirrored at their sides. PROD has both functions (Park et al. 2024, arXiv 2408.01099);
ranges and shapes are derived, the paper's are not known. Lengths are for patches of 256 px.
"""

import math

import cv2
import numpy as np
from jaxtyping import Float

from tasks.restoration.degradations.base import Drawn, Image, rounded

Kernel = Float[np.ndarray, "side side"]
LARGEST = 21
SIGMA = (0.2, 3.0)
ISOTROPIC = 0.7
LENGTH = (3.0, 25.0)
WALK = 0.5
TURN = 0.2
"""Deviation of the change of heading, in radians a pixel."""
STEPS_PER_PIXEL = 4


def blur(image: Image, rng: np.random.Generator, scale: float = 1.0) -> tuple[Image, Drawn]:
    """Blur by a Gaussian."""
    if rng.random() < ISOTROPIC:
        sigma = rng.uniform(*SIGMA) * scale
        kernel = gaussian(sigma, sigma, 0.0)
        return convolved(image, kernel), {"sigma": rounded(sigma)}
    one, other = rng.uniform(*SIGMA, 2) * scale
    angle = rng.uniform(-math.pi, math.pi)
    drawn = {"sigma": [rounded(one), rounded(other)], "angle": rounded(math.degrees(angle))}
    return convolved(image, gaussian(one, other, angle)), drawn


def motion(image: Image, rng: np.random.Generator, scale: float = 1.0) -> tuple[Image, Drawn]:
    """Blur along a path."""
    length = max(1.0, rng.uniform(*LENGTH) * scale)
    angle = rng.uniform(0, math.pi)
    walk = bool(rng.random() < WALK)
    kernel = path(length, angle, TURN if walk else 0.0, rng)
    drawn = {"length": rounded(length), "angle": rounded(math.degrees(angle)), "walk": walk}
    return convolved(image, kernel), drawn


def gaussian(sigma_x: float, sigma_y: float, angle: float) -> Kernel:
    """Return a turned Gaussian kernel."""
    half = min(LARGEST, 2 * math.ceil(3 * max(sigma_x, sigma_y)) + 1) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    cosine, sine = math.cos(angle), math.sin(angle)
    along, across = cosine * x + sine * y, cosine * y - sine * x
    kernel = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return np.asarray(kernel / kernel.sum(), np.float32)


def path(length: float, angle: float, turn: float, rng: np.random.Generator) -> Kernel:
    """Return the kernel of a path, drawn with bilinear weights around its centre."""
    count = max(2, round(length * STEPS_PER_PIXEL))
    headings = angle + np.cumsum(rng.normal(0, turn / math.sqrt(STEPS_PER_PIXEL), count))
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) * (length - 1) / (count - 1)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps[:-1], axis=0)])
    points -= points.mean(axis=0)
    half = math.ceil(np.abs(points).max()) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    low = np.floor(points).astype(int)
    part = points - low
    for dx in (0, 1):
        for dy in (0, 1):
            weight = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
            np.add.at(kernel, (low[:, 1] + half + dy, low[:, 0] + half + dx), weight)
    return np.asarray(kernel / kernel.sum(), np.float32)


def convolved(image: Image, kernel: Kernel) -> Image:
    """Convolve every channel, the picture mirrored at its sides."""
    made = cv2.filter2D(image, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(made)
