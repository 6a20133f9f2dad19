"""tiny-vit: a vision transformer of 2.9 M parameters with 16 x 16 positions, built on timm's.

    pixels [B, 3, H, W] --4 convolutions of stride 2--> tokens [B, H/16 * W/16, 192]
    --+ positions, 6 pre-norm blocks of 3 heads, LayerNorm--> features [B, H/16 * W/16, 192]

Convolutions instead of one patch projection let a transformer be optimised quickly (Xiao et al.
2021, "Early convolutions help transformers see better", arXiv 2106.14881). A picture of 256 pixels
has the whole grid of positions; a smaller one is treated as cut out of such a picture and has the
middle of the grid, and a larger one has the grid resampled. Names in the state dict are those of
timm (`patch_embed`, `pos_embed`, `blocks`, `norm`), so targets written for its models fit.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH = 16
GRID = 16
"""Positions per side; a picture of 256 pixels has as many patches."""
WIDTH, DEPTH, HEADS = 192, 6, 3
NAME = "visionlora_tiny_vit"
"""Name under which timm builds it."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of pixels in 0 .. 1."""


class ConvStem(nn.Module):
    """Four convolutions of stride 2 in the place of timm's patch embedding.

    While it learns, every convolution is followed by a batch norm; `TinyViT.fold` multiplies them
    in, so that what ships has no running statistics which a training loop could change.
    """

    def __init__(
        self,
        img_size: int = GRID * PATCH,
        patch_size: int = PATCH,
        in_chans: int = 3,
        embed_dim: int = WIDTH,
        norm: bool = False,
        **_timm: Any,
    ) -> None:
        super().__init__()
        if patch_size != PATCH:
            raise ValueError(f"four convolutions of stride 2 make patches of {PATCH} pixels")
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = (in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=not norm)
            for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in widths[1:] if norm)
        self.act = nn.GELU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b hp wp d"]:
        """Return the tokens in their rows and columns."""
        last = len(self.convs) - 1
        for number, conv in enumerate(self.convs):
            x = conv(x)
            if self.norms:
                x = self.norms[number](x)
            if number < last:
                x = self.act(x)
        return x.permute(0, 2, 3, 1)


class TinyViT(VisionTransformer):
    """The network; `forward` gives the mean feature of a picture (or logits, with classes).

    Args:
        norm: the stem has batch norms, for training from scratch.
        grid: positions per side.
        num_classes: outputs of a linear head on the mean feature; none for 0.
    """

    pos_embed: nn.Parameter
    patch_embed: ConvStem

    def __init__(
        self,
        *,
        norm: bool = False,
        grid: int = GRID,
        width: int = WIDTH,
        depth: int = DEPTH,
        heads: int = HEADS,
        num_classes: int = 0,
    ) -> None:
        def stem(**arguments: Any) -> ConvStem:
            return ConvStem(norm=norm, **arguments)

        super().__init__(
            img_size=grid * PATCH,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=num_classes,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            dynamic_img_size=True,
            embed_layer=stem,
        )
        self.heads = heads
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (3, grid * PATCH, grid * PATCH),
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "classifier": "head",
        }

    def window(
        self, height: int, width: int, top: int | None = None, left: int | None = None
    ) -> Float[Tensor, "1 n d"]:
        """Return the positions of a picture of `height` x `width` patches.

        Args:
            top, left: where on the grid the picture lies; the middle by default.
        """
        grid = int(self.pos_embed.shape[1] ** 0.5)
        if max(height, width) > grid:
            return resample_abs_pos_embed(
                self.pos_embed, new_size=[height, width], num_prefix_tokens=0
            )
        top = (grid - height) // 2 if top is None else top
        left = (grid - width) // 2 if left is None else left
        table = self.pos_embed.unflatten(1, (grid, grid))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def _pos_embed(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b n d"]:
        return x.flatten(1, 2) + self.window(x.shape[1], x.shape[2])

    def features(
        self, pixels: Float[Tensor, "b 3 h w"], top: int | None = None, left: int | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return one feature per patch, row by row, with the picture where it lies on the grid."""
        tokens = self.patch_embed(pixels)
        height, width = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2) + self.window(height, width, top, left)
        return self.norm(self.blocks(tokens))

    @torch.no_grad()
    def fold(self) -> "TinyViT":
        """Return the same function without batch norms."""
        stem: Any = self.patch_embed
        state = {key: value for key, value in self.state_dict().items() if ".norms." not in key}
        for number, (conv, norm) in enumerate(zip(stem.convs, stem.norms, strict=True)):
            fused = torch.nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
            state[f"patch_embed.convs.{number}.weight"] = fused.weight
            state[f"patch_embed.convs.{number}.bias"] = fused.bias
        plain = TinyViT(
            grid=stem.grid_size[0],
            width=self.embed_dim,
            depth=len(self.blocks),
            heads=self.heads,
            num_classes=self.num_classes,
        )
        plain.load_state_dict(state)
        return plain.eval()


@register_model
def visionlora_tiny_vit(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    num_classes: int = 0,
) -> TinyViT:
    """Return the network with random weights, for `timm.create_model`; takes any picture size."""
    return TinyViT(num_classes=num_classes)
