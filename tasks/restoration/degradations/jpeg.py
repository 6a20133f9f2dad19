"""JPEG: encoded and decoded again, chroma at half size (4:2:0), quality U{20, ..., 95}.

PROD (Park et al. 2024, arXiv 2408.01099) has JPEG among its functions; the range is derived.
"""

import cv2
import numpy as np

from tasks.restoration.degradations.base import Drawn, Image

QUALITY = (20, 95)


def jpeg(image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
    """Compress with a random quality."""
    quality = int(rng.integers(QUALITY[0], QUALITY[1] + 1))
    return compressed(image, quality), {"quality": quality}


def compressed(image: Image, quality: int) -> Image:
    """Encode and decode."""
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, quality),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
    ]
    data = cv2.imencode(".jpg", levels[..., ::-1], options)[1]
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1].astype(np.float32) / 255
