"""What the model is trained on: the loss of a batch, and how well it boxes one."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tasks.tracking.boxes import overlap
from tasks.tracking.geometry.post import select
from tasks.tracking.images import MEAN, STD
from tasks.tracking.losses import tracking_loss
from tasks.tracking.model.head import Prediction
from tasks.tracking.training.samples import Batch


def pair_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the loss of a batch; under several processes, the part of this one."""
    return tracking_loss(predict(model, batch), batch.truth, batch.positive).total


@torch.no_grad()
def pair_overlap(model: nn.Module, batch: Batch) -> Float[Tensor, "b"]:
    """Return the IoU of the box of the highest score with the true one, for every pair."""
    boxes, _ = select(*predict(model, batch), window=0.0)
    return overlap(boxes, batch.truth)[0]


def predict(model: nn.Module, batch: Batch) -> Prediction:
    """Run the model on crops of 8 bits."""
    prediction: Prediction = model(normalised(batch.template), normalised(batch.search), batch.mask)
    return prediction


def normalised(crops: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Return what backbones take."""
    mean, std = (torch.tensor(part, device=crops.device)[:, None, None] for part in (MEAN, STD))
    return (crops / 255 - mean) / std
