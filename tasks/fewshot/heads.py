"""Heads of a vision model without text: what scores its features against the classes.

| head | logits | starts as |
|---|---|---|
| linear | W f + b | the linear probe on frozen features (Kumar et al. 2022, arXiv 2202.10054) |
| prototype | 16 cos(f, p_c) | p_c = the mean of the unit features of class c |

So a run starts where its frozen-features baseline ends: a random head would first pull the features
towards itself. Both are trained together with the adapter and saved in its file.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HeadName = Literal["linear", "prototype"]
HEADS: tuple[HeadName, ...] = ("linear", "prototype")
PROTOTYPE_SCALE = 16.0
"""Sharpness of the softmax over cosines. Features after a ReLU have cosines between 0 and 1 that
lie much further apart than CLIP's, so its 100 would be far too sure of itself."""


class LinearHead(nn.Module):
    """`W f + b`."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Float[Tensor, "batch in"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        return F.linear(features, self.weight, self.bias)

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor) -> None:
        """Take the weights of a linear probe."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class PrototypeHead(nn.Module):
    """`16 cos(f, p_c)`."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features))

    def forward(self, features: Float[Tensor, "batch in"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        return prototype_logits(features, self.weight)

    @torch.no_grad()
    def start(self, prototypes: Tensor) -> None:
        """Take the prototypes of the frozen features."""
        self.weight.copy_(prototypes)


def prototype_logits(
    features: Float[Tensor, "batch in"], prototypes: Float[Tensor, "classes in"]
) -> Float[Tensor, "batch classes"]:
    """Return scaled cosines between features and prototypes."""
    return PROTOTYPE_SCALE * F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).t()


def new_head(kind: HeadName, features: int, classes: int) -> LinearHead | PrototypeHead:
    """Return a head without a start: all zero."""
    head = LinearHead if kind == "linear" else PrototypeHead
    return head(features, classes)
