"""Norms over the channels of a feature map, at every pixel.

y = w (x - mean_c x) / sqrt(var_c x + eps) + b         with bias
y = w x / sqrt(var_c x + eps)                          bias-free: the mean stays in the numerator
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Features = Float[Tensor, "b c h w"]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over channels (eps 1e-6 in NAFNet, 1e-5 in Restormer).

    Being an `nn.LayerNorm`, it is a norm for everyone who looks for norms to tune.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Features) -> Features:
        """Return the normalised features."""
        last = input.permute(0, 2, 3, 1)
        normed = F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class BiasFreeNorm2d(nn.Module):
    """The norm of Restormer's denoisers: no bias, and the mean is not taken off."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Features) -> Features:
        """Return the normalised features."""
        spread = x.var(dim=1, keepdim=True, unbiased=False)
        return x / torch.sqrt(spread + self.eps) * self.weight[:, None, None]
