"""The anchor-free head of LoRAT: two small MLPs that look at every search token by itself.

    score_ij = MLP_1(x_ij)                              one raw logit
    (l, t, r, b)_ij = sigmoid(MLP_4(x_ij))              distances as shares of the search side
    box_ij = (u_j - l, v_i - t, u_j + r, v_i + b),      u_j = (j + .5) / W,  v_i = (i + .5) / H

Each MLP is d -> d -> d -> out with GELU between (Lin et al. 2024, 2403.05231), so the head has
4 d^2 + 9 d + 5 parameters. Weights start from N(0, 0.02^2), biases at zero. A box may leave [0, 1].
Both results are float32 whatever autocast says, because losses and ranking need the digits.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Prediction(NamedTuple):
    """What the tracker says of every cell of the search crop."""

    score: Float[Tensor, "batch height width"]
    """Raw logits, float32."""
    boxes: Float[Tensor, "batch height width 4"]
    """x1, y1, x2, y2 as shares of the search side, float32."""


class MLP(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, width: int, out: int, depth: int = 3) -> None:
        super().__init__()
        sizes = [width] * depth + [out]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """Return the outputs of every token."""
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.layers[-1](x)


class Head(nn.Module):
    """Scores and boxes of the cells of a square grid."""

    centres: Tensor

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_mlp = MLP(width, 1)
        self.reg_mlp = MLP(width, 4)
        axis = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("centres", torch.stack([u, v], -1), persistent=False)

    def forward(self, tokens: Float[Tensor, "batch cells width"]) -> Prediction:
        """Return the prediction for search tokens in row-major order."""
        shape = (len(tokens), self.grid, self.grid)
        score = self.cls_mlp(tokens).float().view(shape)
        sides = self.reg_mlp(tokens).float().view(*shape, 4).sigmoid()
        boxes = torch.cat([self.centres - sides[..., :2], self.centres + sides[..., 2:]], -1)
        return Prediction(score, boxes)
