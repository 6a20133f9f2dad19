"""Local means in NAFNet at test time: TLC (Chu et al. 2022, arXiv 2112.04491).

    m[i, j] = mean of u over a window of h x w around (i, j)

instead of the mean of the whole map. NAFNet learns its channel attention on patches; the mean of a
large picture is another quantity than that of a patch, the mean of a window of about its size (1.5
times it in the official models) is not. Windows stop at the sides, whose values are repeated
outwards, and one that covers the map is the plain mean. By integral image, in float32: a sum over
a whole picture overflows in half precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.restoration.networks.nafnet import Block, NAFNet
from visionlora.errors import ConfigError

FACTOR = 1.5
"""Side of the window over side of the training patch."""
Features = Float[Tensor, "b c h w"]


class LocalMean(nn.Module):
    """The mean of a window around every pixel."""

    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Features) -> Features:
        """Return the local means, or the only one as 1 x 1."""
        height, width = x.shape[-2:]
        h, w = min(self.window[0], height), min(self.window[1], width)
        if (h, w) == (height, width):
            return x.mean(dim=(2, 3), keepdim=True)
        sums = F.pad(x.float().cumsum(2).cumsum(3), (1, 0, 1, 0))
        means = sums[..., h:, w:] - sums[..., :-h, w:] - sums[..., h:, :-w] + sums[..., :-h, :-w]
        means = (means / (h * w)).to(x.dtype)
        rows, columns = height - means.shape[2], width - means.shape[3]
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.pad(means, sides, mode="replicate")


@contextmanager
def local_means(model: nn.Module, patch: int, factor: float = FACTOR) -> Iterator[nn.Module]:
    """Run a NAFNet with local means inside a `with` block.

    Args:
        model: the network.
        patch: side of the patches that it was trained on.
        factor: side of the window over that of the patch.

    Raises:
        ConfigError: another network, or a window of nothing.
    """
    if not isinstance(model, NAFNet):
        raise ConfigError(f"local means are NAFNet's, this is a {type(model).__name__}")
    if patch < 1 or factor <= 0:
        raise ConfigError(f"a window of {factor} times {patch} px is none")
    kept: list[tuple[Block, nn.Module]] = []
    try:
        for block, shrunk in _blocks(model):
            side = max(1, round(patch * factor / shrunk))
            kept.append((block, block.sca[0]))
            block.sca[0] = LocalMean((side, side))
        yield model
    finally:
        for block, pooling in kept:
            block.sca[0] = pooling


def _blocks(model: NAFNet) -> Iterator[tuple[Block, int]]:
    """Yield every block and how many times its map is smaller than the picture."""
    stages = [*enumerate(model.encoders), (len(model.encoders), model.middle_blks)]
    deepest = len(model.encoders)
    stages += [(deepest - 1 - index, stage) for index, stage in enumerate(model.decoders)]
    for level, stage in stages:
        for block in stage.children():
            assert isinstance(block, Block)
            yield block, 2**level
