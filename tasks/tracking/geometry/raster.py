"""From continuous boxes to whole cells: every cell that a box touches belongs to it.

    rasterise(x1, y1, x2, y2) = floor(x1), floor(y1), floor(x2 + 1 - tol), floor(y2 + 1 - tol)

The end is exclusive. A box that ends within `tol` past a border does not touch the cell behind it:
rounding of the map from frame to crop must not add a row of cells.

The same rule makes the template's foreground mask and the positive cells of the score map (LoRAT,
2024, arXiv:2403.05231). That a box thinner than `tol`, or outside the grid, still has the one cell
nearest to it is derived: the official code leaves such a box without any.
"""

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from tasks.tracking.boxes import clip

TOLERANCE = 1e-4


def rasterise(boxes: npt.ArrayLike) -> Int[np.ndarray, "*n 4"]:
    """Return the first cells and the ends, exclusive, of `xyxy` boxes in units of cells."""
    boxes = np.asarray(boxes, dtype=np.float64)
    first = np.floor(boxes[..., :2])
    end = np.floor(boxes[..., 2:] + 1 - TOLERANCE)
    return np.concatenate([first, end], axis=-1).astype(np.int64)


def cells(boxes: npt.ArrayLike, crop_px: int, grid: int) -> Bool[np.ndarray, "*n grid grid"]:
    """Return which cells of a crop each box touches, at least one.

    Args:
        boxes: `xyxy` in pixels of the crop; what leaves the crop is cut off.
        crop_px: side of the crop.
        grid: cells along each side; rows of the result are y, columns x.
    """
    touched = rasterise(clip(boxes, crop_px, crop_px) * (grid / crop_px))
    first = np.minimum(touched[..., :2], grid - 1)
    end = np.maximum(touched[..., 2:], first + 1)
    index = np.arange(grid)
    inside = (index >= first[..., None]) & (index < end[..., None])
    return inside[..., 1, :, None] & inside[..., 0, None, :]
