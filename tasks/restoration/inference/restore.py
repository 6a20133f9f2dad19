"""From a picture to a restored one: whole or in tiles, once or eight times.

    self-ensemble   mean over the eight turns and mirrorings t of   t^-1( f( t(x) ) )

(Timofte et al. 2016, arXiv 1511.02228): about eight times the time for a little more PSNR.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tasks.restoration.inference.tiling import OVERLAP, TILE, WHOLE, Picture, tiled
from visionlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """How a network is run."""

    tile: int | None = None
    """Side of tiles, 0 for never; by default 512 for pictures of more than 1.1 megapixels."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share."""
    ensemble: bool = False
    """Average over the eight turns and mirrorings."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.tile is not None and self.tile < 0:
            raise ConfigError(f"--tile must not be negative, got {self.tile}")
        if not 0 <= self.overlap < (self.tile or TILE):
            raise ConfigError(f"--overlap must lie in [0, {self.tile or TILE}), got {self.overlap}")

    def side(self, picture: Picture) -> int:
        """Return the side of the tiles of a picture, 0 for one piece."""
        if self.tile is not None:
            return self.tile
        return TILE if picture.shape[-1] * picture.shape[-2] > WHOLE else 0


@torch.inference_mode()
def restore(
    model: nn.Module,
    pixels: Float[np.ndarray, "h w 3"],
    options: RestoreOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    on_tile: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "h w 3"]:
    """Return the restored picture, not clamped.

    Args:
        model: the network, on `device` and in eval mode.
        pixels: the picture in [0, 1].
        options: tiles and ensemble.
        device: where the network is.
        on_tile: told how many of how many tiles are done.
    """
    options = options or RestoreOptions()
    picture = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(device)

    def once(part: Picture) -> Picture:
        side = options.side(part)
        if side:
            return tiled(model, part, side, options.overlap, on_tile)
        restored: Tensor = model(part[None])[0]
        return restored

    restored = eight_ways(once, picture) if options.ensemble else once(picture)
    return np.ascontiguousarray(restored.cpu().numpy().transpose(1, 2, 0))


def eight_ways(network: Callable[[Picture], Picture], picture: Picture) -> Picture:
    """Return the mean of a picture restored after every turn and mirroring."""
    total = torch.zeros_like(picture)
    for mirrored in (False, True):
        for quarters in range(4):
            turned = torch.rot90(picture.flip(2) if mirrored else picture, quarters, (1, 2))
            back = torch.rot90(network(turned), -quarters, (1, 2))
            total += back.flip(2) if mirrored else back
    return total / 8
