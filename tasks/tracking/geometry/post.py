"""From what the model says about every cell to one box, and to the state of the tracker.

    penalised  = (1 - window) sigmoid(score) + window Hann        chooses the cell
    confidence = sigmoid(score) of that cell                      without the penalty

`Hann` is the outer product of two symmetric Hann windows, 0 at the border of the map: an object
moves little between two frames. Nothing else is smoothed or penalised (LoRAT, 2024,
arXiv:2403.05231).
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tasks.tracking.boxes import Boxes, clip

WINDOW = 0.45
"""Share of the window in the penalised score."""


def hann(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "h w"]:
    """Return the window of a map."""
    rows = torch.hann_window(height, periodic=False, device=device)
    return torch.outer(rows, torch.hann_window(width, periodic=False, device=device))


def select(
    score: Float[Tensor, "b h w"], boxes: Float[Tensor, "b h w 4"], window: float = WINDOW
) -> tuple[Float[Tensor, "b 4"], Float[Tensor, "b"]]:
    """Return the chosen box of every map, as it was predicted, and its confidence.

    Args:
        score: logits of the cells.
        boxes: predicted boxes of the cells.
        window: share of the window, 0 for the best score alone.
    """
    height, width = score.shape[1:]
    probability = score.float().sigmoid()
    penalised = (1 - window) * probability + window * hann(height, width, score.device)
    best = penalised.flatten(1).argmax(dim=1)
    each = torch.arange(len(score), device=score.device)
    return boxes.flatten(1, 2)[each, best], probability.flatten(1)[each, best]


def next_state(box: npt.ArrayLike, image_size: tuple[int, int]) -> Boxes | None:
    """Return the part of an `xyxy` box inside the frame, or None when nothing is left to follow.

    A tracker that gets None keeps the box it had: a target that is out of view for some frames is
    looked for where it was last seen.

    Args:
        box: prediction in pixels of the frame.
        image_size: width and height of the frame.
    """
    inside = clip(box, *image_size)
    # A comparison with NaN is false, so a prediction that is not finite leaves nothing either.
    return inside if bool(np.all(inside[:2] < inside[2:])) else None
