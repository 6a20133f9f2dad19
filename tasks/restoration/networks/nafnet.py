"""NAFNet: a U-shaped network without activation functions (Chen et al. 2022, arXiv 2204.04676).

    block   u = conv1(norm1(x));  u = gate(conv2(u));  y = x + beta conv3(u * sca(mean(u)))
            v = gate(conv4(norm2(y)));                 out = y + gamma conv5(v)
    gate    (a, b) -> a * b, the two halves of the channels
    net     intro -> encoders, each halving the size and doubling the width -> middle -> decoders,
            each adding the skip of its level -> ending, plus the picture itself

beta and gamma start at zero, so a fresh network is the identity plus `ending(...)` of the intro.
A picture is padded with zeros to a multiple of 2^stages and cut back. Names of parameters are those
of the official weights (megvii-research/NAFNet), which therefore load. A block has 7 c^2 + 33 c.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.restoration.networks.layers import LayerNorm2d

Features = Float[Tensor, "b c h w"]


class NAFNet(nn.Module):
    """The network.

    Args:
        width: channels at full size.
        encoders: blocks of each encoder stage.
        middle: blocks at the smallest size.
        decoders: blocks of each decoder stage, the smallest size first.
    """

    def __init__(
        self,
        width: int = 32,
        encoders: Sequence[int] = (2, 2, 4, 8),
        middle: int = 12,
        decoders: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for count in encoders:
            self.encoders.append(_stage(width, count))
            self.downs.append(nn.Conv2d(width, 2 * width, 2, 2))
            width *= 2
        self.middle_blks = _stage(width, middle)
        for count in decoders:
            up = nn.Conv2d(width, 2 * width, 1, bias=False)
            self.ups.append(nn.Sequential(up, nn.PixelShuffle(2)))
            width //= 2
            self.decoders.append(_stage(width, count))
        self.multiple: int = 2 ** len(self.encoders)
        """What height and width are padded to."""

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the restored picture, not clamped."""
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        x = self.intro(padded)
        skips = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for blocks, up in zip(self.decoders, self.ups, strict=True):
            x = blocks(up(x) + skips.pop())
        restored: Tensor = self.ending(x) + padded
        return restored[..., :height, :width]


class Block(nn.Module):
    """One block at width c."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        # The pooling has no parameter; its place makes the official name `sca.1`.
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, wide, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Features) -> Features:
        """Return the features of the same shape."""
        u = gate(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.conv3(u * self.sca(u)) * self.beta
        restored: Tensor = y + self.conv5(gate(self.conv4(self.norm2(y)))) * self.gamma
        return restored


def gate(x: Features) -> Float[Tensor, "b half h w"]:
    """Return the product of both halves of the channels."""
    one, other = x.chunk(2, dim=1)
    return one * other


def _stage(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels) for _ in range(count)))
