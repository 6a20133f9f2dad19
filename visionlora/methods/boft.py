r"""BOFT: orthogonal butterfly fine-tuning (Liu et al. 2023, arXiv 2311.06243).

    W' = diag(s) W R_1 R_2 ... R_m,   Delta W = W' - W,   s: out
    R_i = P_i diag(R_i1 ... R_in) P_i^T,   R_ik = (I + Q_ik) (I - Q_ik)^-1,   Q = -Q^T: b x b

m = `depth` rotations, each of n = in / b blocks. Block k of R_1 is a run of b features; in R_i
the two halves of a block lie 2^(i-1) half-blocks apart (that is what the permutation P_i does), so
after m rotations every feature has met b 2^(m-1) others. One rotation is OFT with a scale per
output. The arrangement and the scale are those of PEFT 0.21; it stores full b x b matrices M with
Q = (M - M^T) / 2, of which only the triangle of Q matters and is trained here.

An Embedding rotates its output, W' = diag(s) R_1 ... R_m W (derived), a convolution the columns of
its view. The bias is not scaled.

Initial values: Q = 0 and s = 1, so that W' = W. Trained: m n b (b - 1) / 2 + out scalars a site.
Defaults b = 8, m = 2. Merge: W'. Not additive: the change depends on W.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Layer, Shared
from visionlora.methods.parts.rotations import (
    butterfly,
    cayley,
    check_divides,
    entries,
    rotate_blocks,
    rotated_features,
    skew,
)
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """Options of BOFT."""

    method: ClassVar[str] = "boft"

    block: int = 8
    """Size b of a rotated block; even if there is more than one rotation."""
    depth: int = 2
    """Number m of rotations; b 2^(m-1) must divide the rotated features of every site."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.block < 2:
            raise ConfigError(f"boft: block must be at least 2, got {self.block}")
        if self.depth < 1:
            raise ConfigError(f"boft: depth must be at least 1, got {self.depth}")
        if self.depth > 1 and self.block % 2:
            raise ConfigError(f"boft: block must be even at depth {self.depth}, got {self.block}")

    def check_site(self, site: Site) -> None:
        """Refuse blocks that do not fit."""
        what = "block * 2^(depth-1)"
        if self.depth > rotated_features(site).bit_length():  # before a number of that size
            raise ConfigError(
                f"boft: {what} must divide the rotated features, got depth {self.depth} and "
                f"{rotated_features(site)} features at {site.name or 'the layer'}"
            )
        check_divides("boft", self.block * 2 ** (self.depth - 1), what, site)


class BOFT(Delta):
    """A butterfly of rotations of the input and a scale per output."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: BOFTConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        blocks = rotated_features(site) // config.block
        self.Q = nn.Parameter(torch.empty(config.depth, blocks, entries(config.block)))
        self.s = nn.Parameter(torch.empty(site.out_features))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set Q to zero and s to one."""
        self.Q.zero_()
        self.s.fill_(1.0)

    def rotation(self) -> Float[Tensor, "groups g g"]:
        """Return the blocks of R_1 R_2 ... R_m."""
        return butterfly(cayley(skew(self.Q, self.options.block)))

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W' - W."""
        R = self.rotation()
        weight = weight.to(torch.promote_types(weight.dtype, R.dtype))
        if self.kind == "embedding":
            return self.s[:, None] * rotate_blocks(weight.t(), R).t() - weight
        return self.s[:, None] * rotate_blocks(weight, R.mT) - weight

    @property
    def rotate(self) -> Any:
        """The path of a linear layer: `W' x = s * W (R_1 ... R_m x)`."""
        return self._rotate_input if self.kind == "linear" else None

    def _rotate_input(self, x: Tensor) -> Tensor:
        return rotate_blocks(x, self.rotation().to(x.dtype))

    def gain(self) -> Float[Tensor, " out"]:
        """Return s."""
        return self.s

    @property
    def update(self) -> Any:
        """The path of an Embedding, whose output is rotated."""
        return self._rotate_output if self.kind == "embedding" else None

    def _rotate_output(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return `s * (R_1 ... R_m y)` for the looked-up rows y."""
        return self.s.to(y.dtype) * rotate_blocks(y, self.rotation().to(y.dtype))

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return m in / b times b (b - 1) / 2, plus out."""
        blocks = config.depth * (in_features // config.block)
        return int(blocks * entries(config.block) + out_features)

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return the count of a site by its rotated features."""
        return cls.parameter_count(config, site.out_features, rotated_features(site))


register(BOFTConfig, BOFT)
