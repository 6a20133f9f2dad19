"""Decoupled input embedding: where a token is, and what it is, are two separate summands.

    search     x = patch(x) + P + T[2]
    template   z = patch(z) + P[:Hz, :Wz] + T[mask],    mask = 1 on the object, 0 beside it

P holds the backbone's own positions, brought to the search grid once and then frozen. The template
takes its top-left corner, so that both crops share one grid of positions and a token's place alone
does not say which crop it is from (Lin et al. 2024, 2403.05231). T is 3 x d and trains.

How P comes about (`pos_mode`) is part of the weights, since T and the adapters are fitted to it:

* `resample`: bicubic, `align_corners=False`, without antialias, in float32; nothing where the grid
  is the native one. The published trackers.
* `native_slice`: the top-left corner of the native grid, never resized, as the variant of the
  official code on timm's backbones has it.
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tasks.tracking.model.variants import TrackerShape
from visionlora.errors import ConfigError, nearest

PosMode = Literal["resample", "native_slice"]
BACKGROUND, FOREGROUND, SEARCH = 0, 1, 2
"""Rows of T."""


class Embedding(nn.Module):
    """Patches of both crops as tokens, with positions and types."""

    def __init__(
        self,
        patch_embed: nn.Module,
        native: Float[Tensor, "cells width"],
        shape: TrackerShape,
        pos_mode: PosMode = "resample",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = patch_embed
        positions = search_positions(native, shape, pos_mode)
        self.positions = nn.Parameter(positions[None], requires_grad=False)
        self.types = nn.Parameter(torch.empty(3, positions.shape[-1], device=positions.device))
        nn.init.trunc_normal_(self.types, std=0.02)

    def search(
        self, image: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch cells width"]:
        """Return the tokens of search crops."""
        return self._patches(image, self.shape.search_px) + (self.positions + self.types[SEARCH])

    def template(
        self,
        image: Float[Tensor, "batch 3 side side"],
        mask: Int[Tensor, "batch rows columns"],
    ) -> Float[Tensor, "batch cells width"]:
        """Return the tokens of template crops, `mask` being 1 on cells that the object touches."""
        side, grid = self.shape.template_grid, self.shape.search_grid
        corner = self.positions.unflatten(1, (grid, grid))[:, :side, :side].flatten(1, 2)
        types = self.types[mask.flatten(1)]
        return self._patches(image, self.shape.template_px) + (corner + types)

    def _patches(self, image: Tensor, px: int) -> Tensor:
        if image.shape[-2:] != (px, px):
            raise ConfigError(
                f"a crop must be {px} x {px} px here, got {image.shape[-1]} x {image.shape[-2]}"
            )
        patches = self.patch_embed(image)
        # timm's embedding keeps the grid where it serves several sizes: (B, H, W, d)
        return patches.flatten(1, 2) if patches.dim() == 4 else patches


def native_positions(backbone: Any) -> Float[Tensor, "cells width"]:
    """Return a timm-like backbone's positions of patches, without those of other tokens.

    Raises:
        ConfigError: the grid is not a square.
    """
    positions: Tensor = backbone.pos_embed.detach()[0]
    prefix = len(positions) - math.isqrt(len(positions)) ** 2
    if prefix not in (0, int(getattr(backbone, "num_prefix_tokens", 0))):
        raise ConfigError(
            f"the backbone has {len(positions)} positions, which are no square grid of patches"
        )
    return positions[prefix:]


def search_positions(
    native: Float[Tensor, "native width"], shape: TrackerShape, pos_mode: PosMode = "resample"
) -> Float[Tensor, "cells width"]:
    """Return P on the search grid.

    Raises:
        ConfigError: an unknown mode, or a native grid that is too small to be sliced.
    """
    side, grid = math.isqrt(len(native)), shape.search_grid
    if pos_mode not in get_args(PosMode):
        raise ConfigError(
            f"pos_mode must be one of {', '.join(get_args(PosMode))}, got {pos_mode!r}"
            f"{nearest(str(pos_mode), get_args(PosMode))}"
        )
    if side == grid:
        return native.clone()
    if pos_mode == "native_slice":
        if side < grid:
            raise ConfigError(
                f"native_slice cuts the search grid ({grid} x {grid}) out of the backbone's, "
                f"which is only {side} x {side}; use pos_mode resample"
            )
        return native.unflatten(0, (side, side))[:grid, :grid].flatten(0, 1).clone()
    planes = native.float().t().reshape(1, -1, side, side)
    planes = nn.functional.interpolate(
        planes, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False
    )
    return planes[0].flatten(1).t().contiguous().to(native.dtype)
