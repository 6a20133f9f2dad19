r"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2021, arXiv 2108.06098).

    Delta W = s * (B1 A1) * (B2 A2)   (entry by entry),   Bi: out x r,  Ai: r x in,  s = alpha / r

The rank reaches r^2, because the Hadamard product of two rank-r matrices is one factor pair of
width r^2, whose columns and rows are the products of those of the two:

    up[o, (i, j)] = B1[o, i] B2[o, j],   down[(i, j), c] = A1[i, c] A2[j, c]

Hosts use this pair while it is cheaper than forming the change, which is when r^2 is below about
in out / (3 (in + out)): r up to 11 at 768 x 768.

Initial values: Bi uniform in +-1/sqrt(r), A1 uniform in +-1/sqrt(in), A2 = 0, so that the change is
zero. On an Embedding A1 is uniform in +-1, because every token reads one column (derived).
Trained: 2 r (out + in) scalars a site. Merge: W + Delta W.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LowRankConfig):
    """Options of LoHa."""

    method: ClassVar[str] = "loha"


class LoHa(Delta):
    """The Hadamard product of two factor pairs."""

    def __init__(self, config: LoHaConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.kind = site.kind
        self.A1 = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B1 = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.A2 = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B2 = nn.Parameter(torch.empty(site.out_features, config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A1, B1 and B2, set A2 to zero."""
        inputs = 1 if self.kind == "embedding" else weight.shape[1]
        self.A1.copy_(uniform(tuple(self.A1.shape), inputs**-0.5, generator))
        for up in (self.B1, self.B2):
            up.copy_(uniform(tuple(up.shape), up.shape[1] ** -0.5, generator))
        self.A2.zero_()

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return the pair of width r^2."""
        up = self.B1[:, :, None] * self.B2[:, None, :]
        down = self.A1[:, None, :] * self.A2[None, :, :]
        return up.flatten(1), down.flatten(0, 1)

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return s * (B1 A1) * (B2 A2)."""
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 2 r (out + in)."""
        return int(2 * config.rank * (out_features + in_features))


register(LoHaConfig, LoHa)
