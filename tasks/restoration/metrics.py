"""PSNR and SSIM of 8-bit pictures, in the conventions of the papers.

    PSNR = 10 log10(255^2 / mean((a - b)^2))          inf for equal pictures
    SSIM = mean of (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))

with a Gaussian window of 11 x 11 and deviation 1.5, the valid area only, c1 = (.01 255)^2, c2 =
(.03 255)^2 (Wang et al. 2004); channels are averaged. `y` takes the luma of ITU-R BT.601 as MATLAB
does, Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, rounded; a border can be left out. The
range is 255, whatever the picture's largest value.
"""

import math
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from visionlora.errors import ConfigError, DataError

Channel = Literal["rgb", "y"]
Picture8 = UInt8[np.ndarray, "h w 3"]
WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LUMA = np.array([65.481, 128.553, 24.966]) / 255


def psnr(one: Picture8, other: Picture8, channel: Channel = "rgb", crop: int = 0) -> float:
    """Return the PSNR in dB.

    Raises:
        DataError: pictures of different size, or no pixel is left.
    """
    a, b = _prepared(one, channel, crop), _prepared(other, channel, crop)
    _check(a, b)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(one: Picture8, other: Picture8, channel: Channel = "rgb", crop: int = 0) -> float:
    """Return the SSIM.

    Raises:
        DataError: pictures of different size, or smaller than the window.
    """
    a, b = _prepared(one, channel, crop), _prepared(other, channel, crop)
    _check(a, b)
    if min(a.shape[:2]) < WINDOW:
        raise DataError(f"SSIM needs {WINDOW} x {WINDOW} pixels, got {a.shape[1]} x {a.shape[0]}")
    m_a, m_b = _mean(a), _mean(b)
    s_a, s_b = _mean(a * a) - m_a**2, _mean(b * b) - m_b**2
    s_ab = _mean(a * b) - m_a * m_b
    found = (2 * m_a * m_b + C1) * (2 * s_ab + C2)
    found /= (m_a**2 + m_b**2 + C1) * (s_a + s_b + C2)
    return float(found.mean())


def luma(picture: Picture8) -> Float[np.ndarray, "h w"]:
    """Return the rounded luma, from 16 to 235."""
    return np.rint(16 + picture.astype(np.float64) @ LUMA)


def _prepared(picture: Picture8, channel: Channel, crop: int) -> Float[np.ndarray, "h w c"]:
    if picture.dtype != np.uint8 or picture.ndim != 3:
        raise DataError(f"figures are of RGB in 8 bits, got {picture.dtype} {picture.shape}")
    if crop < 0:
        raise ConfigError(f"the border that is left out must not be negative, got {crop}")
    if crop:
        picture = picture[crop:-crop, crop:-crop]
    return luma(picture)[..., None] if channel == "y" else picture.astype(np.float64)


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise DataError(
            f"pictures of different size: {a.shape[1]} x {a.shape[0]} and "
            f"{b.shape[1]} x {b.shape[0]}"
        )
    if not a.size:
        raise DataError("the border takes the whole picture")


def _mean(values: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Return the local mean over whole windows."""
    blurred = cv2.GaussianBlur(values, (WINDOW, WINDOW), DEVIATION)
    half = WINDOW // 2
    return np.asarray(blurred.reshape(values.shape)[half:-half, half:-half])
