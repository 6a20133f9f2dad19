"""Restormer: attention between channels instead of pixels (Zamir et al. 2022, arXiv 2111.09881).

    attention   q, k, v = depthwise3x3(conv1x1(x)); per head, rows of length h w
                out = conv1x1( softmax( t * q^ k^^T ) v ),   q^, k^ of unit length, a c x c map
    feed        a, b = depthwise3x3(conv1x1(x));   out = conv1x1( gelu(a) * b ),   f = int(2.66 c)
    block       x + attention(norm1(x));  x + feed(norm2(x))
    net         four levels joined by pixel (un)shuffling; skips are concatenated and, but for the
                first level, reduced by a 1x1 conv; refinement; output, plus the picture itself

A picture is mirrored out to a multiple of 8 and cut back. Written from the paper's formulas; names
of parameters are those of the published weights. No conv has a bias.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.restoration.networks.layers import BiasFreeNorm2d, LayerNorm2d

EXPANSION = 2.66
EPS = 1e-5
MULTIPLE = 8
Features = Float[Tensor, "b c h w"]


class Restormer(nn.Module):
    """The network.

    Args:
        width: channels at full size.
        blocks: blocks of the four levels; decoders have those of the first three.
        refinement: blocks after the last decoder.
        heads: attention heads of the four levels.
        bias_free: norms without bias, as in the published denoisers.
    """

    def __init__(
        self,
        width: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        bias_free: bool = False,
    ) -> None:
        super().__init__()
        self.multiple = MULTIPLE

        def level(channels: int, at: int, count: int | None = None) -> nn.Sequential:
            made = (
                Block(channels, heads[at], bias_free)
                for _ in range(blocks[at] if count is None else count)
            )
            return nn.Sequential(*made)

        w = width
        self.patch_embed = PatchEmbed(w)
        self.encoder_level1 = level(w, 0)
        self.down1_2 = Resize(w, smaller=True)
        self.encoder_level2 = level(2 * w, 1)
        self.down2_3 = Resize(2 * w, smaller=True)
        self.encoder_level3 = level(4 * w, 2)
        self.down3_4 = Resize(4 * w, smaller=True)
        self.latent = level(8 * w, 3)
        self.up4_3 = Resize(8 * w, smaller=False)
        self.reduce_chan_level3 = nn.Conv2d(8 * w, 4 * w, 1, bias=False)
        self.decoder_level3 = level(4 * w, 2)
        self.up3_2 = Resize(4 * w, smaller=False)
        self.reduce_chan_level2 = nn.Conv2d(4 * w, 2 * w, 1, bias=False)
        self.decoder_level2 = level(2 * w, 1)
        self.up2_1 = Resize(2 * w, smaller=False)
        self.decoder_level1 = level(2 * w, 0)
        self.refinement = level(2 * w, 0, refinement)
        self.output = nn.Conv2d(2 * w, 3, 3, padding=1, bias=False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the restored picture, not clamped."""
        height, width = image.shape[-2:]
        padded = mirrored(image, -height % self.multiple, -width % self.multiple)
        one = self.encoder_level1(self.patch_embed(padded))
        two = self.encoder_level2(self.down1_2(one))
        three = self.encoder_level3(self.down2_3(two))
        x = self.latent(self.down3_4(three))
        x = self.reduce_chan_level3(torch.cat([self.up4_3(x), three], 1))
        x = self.reduce_chan_level2(torch.cat([self.up3_2(self.decoder_level3(x)), two], 1))
        x = torch.cat([self.up2_1(self.decoder_level2(x)), one], 1)
        restored: Tensor = self.output(self.refinement(self.decoder_level1(x))) + padded
        return restored[..., :height, :width]


class Block(nn.Module):
    """Attention between channels, then a gated feed-forward."""

    def __init__(self, channels: int, heads: int, bias_free: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels, bias_free), Norm(channels, bias_free)
        self.attn, self.ffn = Attention(channels, heads), FeedForward(channels)

    def forward(self, x: Features) -> Features:
        """Return the features of the same shape."""
        x = x + self.attn(self.norm1(x))
        restored: Tensor = x + self.ffn(self.norm2(x))
        return restored


class Attention(nn.Module):
    """Transposed attention: the map is channels by channels."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        wide = 3 * channels
        self.qkv = nn.Conv2d(channels, wide, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Features) -> Features:
        """Return the features of the same shape."""
        b, c, h, w = x.shape
        qkv = self.qkv_dwconv(self.qkv(x)).view(b, 3, len(self.temperature), -1, h * w)
        q, k, v = qkv.unbind(1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        mixed = (weights * self.temperature).softmax(dim=-1) @ v
        projected: Tensor = self.project_out(mixed.reshape(b, c, h, w))
        return projected


class FeedForward(nn.Module):
    """Feed-forward whose one half opens the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = int(EXPANSION * channels)
        wide = 2 * hidden
        self.project_in = nn.Conv2d(channels, wide, 1, bias=False)
        self.dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Features) -> Features:
        """Return the features of the same shape."""
        opening, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        projected: Tensor = self.project_out(F.gelu(opening) * value)
        return projected


class Resize(nn.Module):
    """Half the size and twice the channels, or the other way round."""

    def __init__(self, channels: int, *, smaller: bool) -> None:
        super().__init__()
        out = channels // 2 if smaller else 2 * channels
        conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelUnshuffle(2) if smaller else nn.PixelShuffle(2))

    def forward(self, x: Features) -> Features:
        """Return the resized features."""
        resized: Tensor = self.body(x)
        return resized


class Norm(nn.Module):
    """A norm under the published name `norm1.body`."""

    def __init__(self, channels: int, bias_free: bool) -> None:
        super().__init__()
        self.body = BiasFreeNorm2d(channels, EPS) if bias_free else LayerNorm2d(channels, EPS)

    def forward(self, x: Features) -> Features:
        """Return the normalised features."""
        normed: Tensor = self.body(x)
        return normed


class PatchEmbed(nn.Module):
    """The first conv, under the published name `patch_embed.proj`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the first features."""
        features: Tensor = self.proj(image)
        return features


def mirrored(image: Features, bottom: int, right: int) -> Features:
    """Mirror a picture out at the bottom and the right, however small it is."""
    rows, columns = image.shape[-2:]
    down = _mirror(rows, bottom).to(image.device)
    across = _mirror(columns, right).to(image.device)
    return image[..., down, :][..., across] if bottom or right else image


def _mirror(size: int, more: int) -> Tensor:
    """Return 0 .. size-1 and `more` indices that go back and forth."""
    if size == 1:
        return torch.zeros(1 + more, dtype=torch.long)
    index = torch.arange(size + more) % (2 * size - 2)
    return torch.where(index < size, index, 2 * size - 2 - index)
