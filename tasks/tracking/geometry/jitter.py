"""Search crops of training: the object somewhere in the crop, larger or smaller, not as it was.

Around the crop that tracking would use, scales and place are drawn at random:

    scale_x, scale_y <- scale / exp(0.25 N(0, 1))                each axis its own: aspect changes
    translation      <- translation + 3 m U(-1, 1)^2,            m = (w scale_x + h scale_y) / 2

with `w, h` the size of the object, so `m` is its mean side in the crop. A draw counts when at least
10 px of the object are in the crop each way (LoRAT, 2024, arXiv:2403.05231). Templates are not
jittered.
"""

import numpy as np
import numpy.typing as npt

from tasks.tracking.boxes import clip
from tasks.tracking.geometry.crop import Mapping, centred, crop_mapping

SCALE_STD = 0.25
REACH = 3.0
"""Farthest move along an axis, in mean sides of the object; half of it keeps most objects whole."""
LEAST_VISIBLE = 10.0
"""Pixels of the object, each way, that have to be in the crop."""
ATTEMPTS = 12


def jittered_mapping(
    box: npt.ArrayLike,
    out_size: int,
    area_factor: float,
    generator: np.random.Generator,
    reach: float = REACH,
    spread: float = SCALE_STD,
) -> Mapping | None:
    """Return a random map around an `xyxy` box, or None when no attempt shows enough of it.

    None is rare but for objects that are many times longer than wide: the caller then draws another
    sample.
    """
    box = np.asarray(box, dtype=np.float64)
    plain = crop_mapping(box, out_size, area_factor).scale
    for _ in range(ATTEMPTS):
        scale = plain / np.exp(spread * generator.standard_normal(2))
        side = np.mean((box[2:] - box[:2]) * scale)
        shift = generator.uniform(-1.0, 1.0, size=2) * side * reach
        mapping = centred(box, scale, out_size)
        mapping = Mapping(scale, mapping.translation + shift)
        seen = clip(mapping.apply(box), out_size, out_size)
        if np.all(seen[2:] - seen[:2] >= LEAST_VISIBLE):
            return mapping
    return None
