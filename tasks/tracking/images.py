"""Frames as arrays: RGB, 8 bits, upright."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from visionlora.errors import DataError

Frame = UInt8[np.ndarray, "height width 3"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels in 0..1: what every backbone takes."""


def read_image(path: Path) -> Frame:
    """Decode one frame.

    Raises:
        DataError: there is no such file, it is no image, or it is truncated.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255
                return np.repeat((np.asarray(upright) / 256).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"no frame {path}") from None
    # What Pillow raises depends on the format and on what is broken.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise DataError(f"cannot read the frame {path}: {reason}") from error
