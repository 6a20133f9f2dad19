r"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280).

    W' = W R,   Delta W = W' - W,   R = diag(R_1 ... R_n),   R_k = (I + Q_k) (I - Q_k)^-1
    y = W (R x) + b,   Q_k = -Q_k^T: b x b,   n = in / b

Every R_k is orthogonal, so W' keeps the singular values of W and the norms of its rows. Written as
in PEFT 0.21, where the input is rotated in blocks, the triangle of Q_k is trained and `block` is
`oft_block_size`. `share` uses one R_k for all blocks. `cayley="neumann"` replaces the inverse by
four terms of its series, R_k = (I + Q) (I + Q + Q^2 + Q^3): no linear solve, and orthogonal only up
to fourth order in Q. PEFT's own series has the opposite sign of Q (its two forms are transposes of
each other), so its weights are ours with the sign turned.

An Embedding rotates its output: W' = R W, as PEFT does. A convolution rotates the columns of its
view (PEFT merges so; its unmerged forward sums overlapping patches, which is another function for
kernels larger than one).

Initial values: Q = 0, so that W' = W. Trained: n b (b - 1) / 2 scalars a site, b (b - 1) / 2 if
shared. Merge: W R. Not additive: the change depends on W.

Cost on a linear layer: in b multiplications a token, and one product with the frozen W.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Layer, Shared
from visionlora.methods.parts.rotations import (
    cayley,
    cayley_series,
    check_divides,
    entries,
    rotate_blocks,
    rotated_features,
    skew,
)
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Options of OFT."""

    method: ClassVar[str] = "oft"

    block: int = 32
    """Size b of a rotated block; it must divide the rotated features of every site."""
    share: bool = False
    """One rotation for all blocks of a site."""
    cayley: Literal["exact", "neumann"] = "exact"
    """Rotation by a linear solve, or by a series that is nearly orthogonal."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.block < 2:
            raise ConfigError(f"oft: block must be at least 2, got {self.block}")

    def check_site(self, site: Site) -> None:
        """Refuse blocks that do not fit."""
        check_divides("oft", self.block, "block", site)


class OFT(Delta):
    """A block-diagonal rotation of the input."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: OFTConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        blocks = 1 if config.share else rotated_features(site) // config.block
        self.Q = nn.Parameter(torch.empty(blocks, entries(config.block)))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set Q to zero."""
        self.Q.zero_()

    def rotation(self) -> Float[Tensor, "n b b"]:
        """Return the blocks R_k."""
        Q = skew(self.Q, self.options.block)
        return cayley(Q) if self.options.cayley == "exact" else cayley_series(Q)

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W R - W, or R W - W on an Embedding."""
        R = self.rotation()
        weight = weight.to(torch.promote_types(weight.dtype, R.dtype))
        if self.kind == "embedding":
            return rotate_blocks(weight.t(), R).t() - weight
        return rotate_blocks(weight, R.mT) - weight

    @property
    def rotate(self) -> Any:
        """The path of a linear layer."""
        return self._rotate if self.kind == "linear" else None

    @property
    def update(self) -> Any:
        """The path of an Embedding."""
        return self._rotate_output if self.kind == "embedding" else None

    def _rotate(self, x: Tensor) -> Tensor:
        """Return R x."""
        return rotate_blocks(x, self.rotation().to(x.dtype))

    def _rotate_output(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return R y for the looked-up rows y."""
        return self._rotate(y)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return in / b times b (b - 1) / 2."""
        blocks = 1 if config.share else in_features // config.block
        return blocks * entries(config.block)

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return the count of a site by its rotated features."""
        return cls.parameter_count(config, site.out_features, rotated_features(site))


register(OFTConfig, OFT)
