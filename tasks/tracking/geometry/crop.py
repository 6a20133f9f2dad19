"""The square part of a frame that the model sees, and the map between frame and crop.

For a box of size `w, h` and an area factor `f`, with `p = (w + h) / 2`:

    source area = (w + (f - 1) p) (h + (f - 1) p)        context as SiamFC adds it
    scale       = sqrt(out^2 / source area)              the same for x and y
    u           = scale x + translation                  the box's centre falls on the crop's

Pixels are resampled from whole pixels to whole pixels, so the map that the content really follows
differs a little from the one asked for. `crop` returns it, **corrected**, and every box and label
has to go through the corrected one: by the other, boxes are off by about half a pixel of the
frame, sometimes by more than one.

Context: Bertinetto et al., "Fully-Convolutional Siamese Networks for Object Tracking", 2016,
arXiv:1606.09549. Filled by the mean of the frame, corrected as in LoRAT, 2024, arXiv:2403.05231.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from tasks.tracking.boxes import Boxes, clip
from tasks.tracking.geometry.raster import rasterise

MIN_SIDE = 10.0
"""Least width and height, in pixels, of the box around which a search crop is cut."""

Image = Shaped[Tensor, "3 height width"]
"""Channels first, values 0..255 in any dtype; only the part that is seen is converted."""


@dataclass(frozen=True, eq=False)
class Mapping:
    """The map `u = scale * x + translation` from a frame to a crop, in pixels of both."""

    scale: Float[np.ndarray, "2"]
    translation: Float[np.ndarray, "2"]

    def apply(self, boxes: npt.ArrayLike) -> Boxes:
        """Return `xyxy` boxes of the frame in the crop."""
        boxes = np.asarray(boxes, dtype=np.float64)
        return boxes * np.tile(self.scale, 2) + np.tile(self.translation, 2)

    def invert(self, boxes: npt.ArrayLike) -> Boxes:
        """Return `xyxy` boxes of the crop in the frame."""
        boxes = np.asarray(boxes, dtype=np.float64)
        return (boxes - np.tile(self.translation, 2)) / np.tile(self.scale, 2)


def centred(box: Boxes, scale: Float[np.ndarray, "2"], out_size: int) -> Mapping:
    """Return the map with these scales that brings the box's centre to the crop's."""
    centre = (box[:2] + box[2:]) / 2
    return Mapping(scale, out_size / 2 - centre * scale)


def crop_mapping(box: npt.ArrayLike, out_size: int, area_factor: float) -> Mapping:
    """Return the map that is asked for, around an `xyxy` box that is not empty."""
    box = np.asarray(box, dtype=np.float64)
    size = box[2:] - box[:2]
    area = np.prod(size + (area_factor - 1) * size.mean())
    return centred(box, np.full(2, out_size / np.sqrt(area)), out_size)


def widen(box: npt.ArrayLike, least: float = MIN_SIDE) -> Boxes:
    """Return a box of at least `least` pixels each way, about the same centre."""
    box = np.asarray(box, dtype=np.float64)
    missing = np.maximum(least - (box[2:] - box[:2]), 0.0) / 2
    return np.concatenate([box[:2] - missing, box[2:] + missing])


def channel_mean(image: Image) -> Float[Tensor, "3"]:
    """Return what the part of a crop outside the frame is filled with."""
    return image.float().mean(dim=(1, 2))


def crop(
    image: Image, mapping: Mapping, out_size: int, fill: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "3 {out_size} {out_size}"], Mapping]:
    """Return the crop, values 0..255, and the map that its pixels follow.

    A crop that does not meet the frame is all `fill`, and its map is the one that was asked for.
    """
    height, width = image.shape[1:]
    # Pixels of the crop that show the frame, and pixels of the frame that they show.
    target = rasterise(clip(mapping.apply([0, 0, width, height]), out_size, out_size))
    source = clip(rasterise(mapping.invert(target)), width, height).astype(np.int64)

    out = fill.float()[:, None, None].repeat(1, out_size, out_size)
    shown, seen = target[2:] - target[:2], source[2:] - source[:2]
    if min(*shown, *seen) < 1:
        return out, mapping
    (x1, y1, x2, y2), (u1, v1, u2, v2) = source.tolist(), target.tolist()
    pixels = image[None, :, y1:y2, x1:x2].float()
    out[:, v1:v2, u1:u2] = F.interpolate(pixels, (v2 - v1, u2 - u1), mode="bilinear")[0]
    scale = shown / seen
    return out, Mapping(scale, target[:2] - source[:2] * scale)
