r"""What restoration networks are trained on.

    l1     mean |o - t|
    psnr   (10 / ln 10) mean_b ln(mean_chw (o - t)^2 + 1e-8)

The second is minus the PSNR of a range of one, so it is negative by design and falls as pictures
get better (NAFNet, Chen et al. 2022, arXiv 2204.04676). Means are in float32 whatever the forward
ran in.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.restoration.pairs.samples import Batch

LossName = Literal["l1", "psnr"]
Loss = Callable[[nn.Module, Batch], Tensor]
Pictures = Float[Tensor, "b 3 p p"]
EPS = 1e-8


def l1_loss(output: Pictures, target: Pictures) -> Float[Tensor, ""]:
    """Return the mean absolute error."""
    return F.l1_loss(output.float(), target)


def minus_psnr(output: Pictures, target: Pictures) -> Float[Tensor, ""]:
    """Return minus the mean PSNR."""
    error = (output.float() - target).square().mean(dim=(1, 2, 3))
    return 10 / math.log(10) * torch.log(error + EPS).mean()


def squared_error(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the summed squared error, of which contributions are taken."""
    return (model(batch.input).float() - batch.target).square().sum()


LOSSES: dict[str, Callable[[Pictures, Pictures], Tensor]] = {"l1": l1_loss, "psnr": minus_psnr}


def loss_of(name: LossName) -> Loss:
    """Return a loss as the training loop calls it."""
    measure = LOSSES[name]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return measure(model(batch.input), batch.target)

    return loss


def train_psnr(name: LossName, loss: float) -> dict[str, float]:
    """Return the PSNR on training patches that a logged loss stands for, if it does."""
    return {"train_psnr": -loss} if name == "psnr" else {}
