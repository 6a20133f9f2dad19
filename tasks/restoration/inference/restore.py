"""From a picture to a restored one: whole or in tiles, once or eight times.

    self-ensemble   mean over the eight turns and mirrorings t of   t^-1( f( t(x) ) )

(Timofte et al. 2016, arXiv 1511.02228): about eight times the time for a little more PSNR. Of a
picture in tiles, every tile is turned, so that memory stays that of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tasks.restoration.images import to_levels
from tasks.restoration.inference.tiling import OVERLAP, TILE, WHOLE, OnTile, Picture, Rows, bands
from visionlora.errors import ConfigError, DataError


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

    def side(self, height: int, width: int) -> int:
        """Return the side of the tiles of a picture; that of the picture for one piece."""
        if self.tile is None:
            return TILE if height * width > WHOLE else max(height, width)
        return self.tile or max(height, width)


@torch.inference_mode()
def restore(
    model: nn.Module,
    pixels: Shaped[np.ndarray, "h w 3"],
    options: RestoreOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    on_tile: OnTile | None = None,
) -> Shaped[np.ndarray, "h w 3"]:
    """Return the restored picture, of the type of the given one.

    Args:
        model: the network, on `device` and in eval mode.
        pixels: floats, black 0 and white 1, of which the result is not clamped; or levels of 8 or
            16 bits, which are taken and given back row by row, so that a large picture never
            stands in memory as floats.
        options: tiles and ensemble.
        device: where the network is.
        on_tile: told how many of how many tiles are done.

    Raises:
        ConfigError: the network changes the size of pictures.
        DataError: its output is not finite.
    """
    options = options or RestoreOptions()
    height, width = pixels.shape[:2]
    levels = np.issubdtype(pixels.dtype, np.integer)
    white = np.iinfo(pixels.dtype).max if levels else 1

    def read(top: int, stop: int) -> Rows:
        rows = np.ascontiguousarray(pixels[top:stop].transpose(2, 0, 1), np.float32)
        return torch.from_numpy(rows).to(device) / white

    def once(part: Picture) -> Picture:
        restored: Tensor = model(part[None])[0].float()
        if restored.shape != part.shape:
            raise ConfigError(
                f"the network makes {tuple(restored.shape)} of {tuple(part.shape)}; one that keeps "
                "the size of pictures is needed"
            )
        return restored

    network = (lambda part: eight_ways(once, part)) if options.ensemble else once
    side = options.side(height, width)
    # One tile needs no fading, and is what the network says to the last bit.
    overlap = options.overlap if side < max(height, width) else 0
    restored = np.empty_like(pixels)
    for top, rows in bands(network, read, (height, width), side, overlap, on_tile):
        if not torch.isfinite(rows).all():
            raise DataError("the network's output is not finite; --precision fp32 may help")
        found = rows.cpu().numpy().transpose(1, 2, 0)
        restored[top : top + len(found)] = to_levels(found, pixels.dtype) if levels else found
    return restored


def eight_ways(network: Callable[[Picture], Picture], picture: Picture) -> Picture:
    """Return the mean of a picture restored after every turn and mirroring."""
    total = torch.zeros_like(picture)
    for mirrored in (False, True):
        for quarters in range(4):
            turned = torch.rot90(picture.flip(2) if mirrored else picture, quarters, (1, 2))
            back = torch.rot90(network(turned), -quarters, (1, 2))
            total += back.flip(2) if mirrored else back
    return total / 8
