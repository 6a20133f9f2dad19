"""What the tracker is trained on: where the object is, weighted by how well it is boxed.

    target(cell)   = IoU(truth, predicted box) at positive cells, without gradient; 0 elsewhere
    classification = sum over all cells of BCE(score, target)      / N
    regression     = sum over positive cells of 1 - GIoU           / N
    total          = classification + regression

`N` is the number of positive cells in the batch, averaged over processes, at least 1: the mean of
the processes' gradients is then that of one large batch. Boxes are normalised by the side of the
search crop and not clipped (LoRAT, 2024, arXiv:2403.05231).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tasks.tracking.boxes import overlap
from visionlora.init.processes import add_up


class Losses(NamedTuple):
    """Parts of the loss, and the mean IoU of the positive cells of this process."""

    total: Float[Tensor, ""]
    classification: Float[Tensor, ""]
    regression: Float[Tensor, ""]
    iou: Float[Tensor, ""]


def tracking_loss(
    prediction: tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w 4"]],
    truth: Float[Tensor, "b 4"],
    positive: Bool[Tensor, "b h w"],
) -> Losses:
    """Return the losses of a batch. Under several processes every one has to call this.

    Args:
        prediction: logits and normalised `xyxy` boxes of every cell.
        truth: normalised `xyxy` boxes.
        positive: cells that the true boxes touch.
    """
    score, boxes = (part.float() for part in prediction)
    iou, giou = overlap(boxes, truth.float()[:, None, None])
    # Cells are masked, not gathered: shapes do not depend on the data, and a GPU need not wait.
    target = torch.where(positive, iou.detach(), 0.0)
    missed = torch.where(positive, 1 - giou, 0.0)
    count = positive.sum().float()
    mean = _mean_over_processes(count).clamp(min=1)
    classification = F.binary_cross_entropy_with_logits(score, target, reduction="sum") / mean
    regression = missed.sum() / mean
    return Losses(
        classification + regression, classification, regression, target.sum() / count.clamp(min=1)
    )


def _mean_over_processes(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    total = torch.stack([value, torch.ones_like(value)])
    add_up([total])
    return total[0] / total[1]
