r"""A large picture piece by piece, with seams that cannot be seen.

    out = sum_t w_t f(tile_t) / sum_t w_t

Tiles start at 0, stride, 2 stride, ..., size - tile, with stride = tile - overlap. The weight w of
a tile falls linearly to its sides within the overlap, so that one fades into the next. Rows of
tiles are finished from top to bottom, and only one row of tiles is held: neither a network's memory
nor that of the sums grows with the height of a picture. Networks that look at the whole picture
(NAFNet's global mean, Restormer's attention) see a tile only, so tiles are not exactly the whole; a
plain conv net's are, away from the seams.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError

Picture = Float[Tensor, "3 h w"]
Rows = Float[Tensor, "3 rows w"]
Network = Callable[[Picture], Picture]
"""Restores a picture and keeps its size."""
OnTile = Callable[[int, int], None]
"""Told how many of how many tiles are done."""
TILE, OVERLAP = 512, 32
WHOLE = 1_100_000
"""Pixels up to which a picture is restored in one piece unless a tile is asked for."""


def tiled(
    network: Network,
    picture: Picture,
    tile: int = TILE,
    overlap: int = OVERLAP,
    on_tile: OnTile | None = None,
) -> Picture:
    """Restore a picture tile by tile.

    Raises:
        ConfigError: an overlap that leaves no step between tiles.
    """
    restored = torch.empty_like(picture)
    size = (picture.shape[-2], picture.shape[-1])
    read = lambda top, stop: picture[:, top:stop]  # noqa: E731
    for top, rows in bands(network, read, size, tile, overlap, on_tile):
        restored[:, top : top + rows.shape[1]] = rows
    return restored


def bands(
    network: Network,
    read: Callable[[int, int], Rows],
    size: tuple[int, int],
    tile: int = TILE,
    overlap: int = OVERLAP,
    on_tile: OnTile | None = None,
) -> Iterator[tuple[int, Rows]]:
    """Yield restored rows from top to bottom, with the number of the first of them.

    Args:
        network: restores one tile.
        read: returns the rows from one number up to another.
        size: height and width of the picture.
        tile: side of the tiles; a picture that is smaller is one tile.
        overlap: what neighbouring tiles share.
        on_tile: see above.

    Raises:
        ConfigError: an overlap that leaves no step between tiles.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ConfigError(f"tiles of {tile} px cannot overlap by {overlap} px")
    tops, lefts = (starts(extent, tile, overlap) for extent in size)
    begun: tuple[Tensor, Tensor] | None = None
    """Sums of the rows that the tiles below cover too."""
    for number, top in enumerate(tops):
        rows = read(top, min(top + tile, size[0]))
        total, weights = torch.zeros_like(rows), torch.zeros_like(rows[:1])
        if begun is not None:
            total[:, : begun[0].shape[1]] = begun[0]
            weights[:, : begun[1].shape[1]] = begun[1]
        for column, left in enumerate(lefts, 1):
            place = (slice(None), slice(None), slice(left, left + tile))
            weight = fade(rows[place].shape[1:], overlap).to(rows)
            total[place] += network(rows[place]) * weight
            weights[place] += weight
            if on_tile is not None:
                on_tile(number * len(lefts) + column, len(tops) * len(lefts))
        ready = tops[number + 1] - top if number + 1 < len(tops) else rows.shape[1]
        yield top, total[:, :ready] / weights[:, :ready]
        begun = total[:, ready:], weights[:, ready:]


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
