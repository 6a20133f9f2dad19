"""What training keeps of an annotation (Lin et al. 2024, arXiv 2403.05231, official code).

Boxes are clipped to the image; where nothing is left, or the annotation says that the object is
absent, it does not exist. Frames before the first and after the last one with a box are cut off.
"""

import numpy as np
from jaxtyping import Bool, Float

from tasks.tracking.sequences.sequence import Frames, Track


def clean(
    name: str,
    frames: Frames,
    boxes: Float[np.ndarray, "n 4"],
    exists: Bool[np.ndarray, "n"] | None,
    size: tuple[int, int],
    benchmark: str,
) -> Track | None:
    """Return the track that training can use, or None when there is no box at all.

    `boxes` are x, y, w, h, 0-based, `exists` what the annotation says of each (None: all), `size`
    the width and height of the frames. Frames beyond the last box are cut off too.
    """
    clipped, inside = clip(boxes, size)
    if exists is not None:
        inside &= exists
    kept = np.flatnonzero(inside)
    if not kept.size:
        return None
    clipped[~inside] = np.nan
    part = slice(int(kept[0]), int(kept[-1]) + 1)
    return Track(name, frames[part], clipped[part], inside[part], benchmark)


def clip(
    boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, "n"]]:
    """Return the parts of boxes inside an image, and whether anything is left of each."""
    limit = np.array(size, dtype=np.float64)
    start = np.clip(boxes[:, :2], 0.0, limit)
    end = np.clip(boxes[:, :2] + boxes[:, 2:], 0.0, limit)
    extent = end - start
    # A comparison with NaN is false: such a box is not there.
    return np.concatenate([start, extent], axis=1), (extent > 0).all(axis=1)
