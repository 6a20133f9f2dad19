r"""A large picture piece by piece, with seams that cannot be seen.

    out = sum_t w_t f(tile_t) / sum_t w_t

Tiles start at 0, stride, 2 stride, ..., size - tile, with stride = tile - overlap. The weight w of
a tile falls linearly to its sides within the overlap, so that one fades into the next. What is
held in memory is one tile's features, the picture, and the sum: a network's memory does not grow
with the picture. Networks that look at the whole picture (NAFNet's global mean, Restormer's
attention) see a tile only, so tiles are not exactly the whole; a plain conv net's are, away from
the seams.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError

Picture = Float[Tensor, "3 h w"]
TILE, OVERLAP = 512, 32
WHOLE = 1_100_000
"""Pixels up to which a picture is restored in one piece unless a tile is asked for."""


def tiled(
    network: Callable[[Float[Tensor, "1 3 h w"]], Tensor],
    picture: Picture,
    tile: int = TILE,
    overlap: int = OVERLAP,
    on_tile: Callable[[int, int], None] | None = None,
) -> Picture:
    """Restore a picture tile by tile.

    Args:
        network: restores a picture and keeps its size.
        picture: where it is restored, its device and type are those of the tiles too.
        tile: side of the tiles; a picture that is smaller is one tile.
        overlap: what neighbouring tiles share.
        on_tile: told how many of how many tiles are done.

    Raises:
        ConfigError: an overlap that leaves no step between tiles.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ConfigError(f"tiles of {tile} px cannot overlap by {overlap} px")
    height, width = picture.shape[-2:]
    rows, columns = starts(height, tile, overlap), starts(width, tile, overlap)
    total = torch.zeros_like(picture)
    weights = picture.new_zeros(1, height, width)
    for done, (top, left) in enumerate(((top, left) for top in rows for left in columns), 1):
        place = (slice(None), slice(top, top + tile), slice(left, left + tile))
        part = picture[place]
        weight = fade(part.shape[-2:], overlap).to(picture)
        total[place] += network(part[None])[0] * weight
        weights[place] += weight
        if on_tile is not None:
            on_tile(done, len(rows) * len(columns))
    return total.div_(weights)


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along one side."""
    if size <= tile:
        return [0]
    return sorted({*range(0, size - tile, tile - overlap), size - tile})


def fade(size: tuple[int, ...] | torch.Size, overlap: int) -> Float[Tensor, "h w"]:
    """Return the weight of a tile: 1 inside, falling to its sides, nowhere 0."""
    ramps = []
    for extent in size:
        distance = torch.arange(extent) + 1.0
        ramps.append(
            torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
        )
    return torch.outer(*ramps)
