r"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR).

    Delta W = W * (B A)   (entry by entry),   B: out x r,  A: r x in

The change can have the rank of W although it is trained through r directions. There is no scale.
An entry of W that is zero stays zero, and the change is built from the frozen W, also on merging.

Initial values: A uniform in +-1/sqrt(in), B = 0, so that the change is zero; on an Embedding A = 0
and B normal. Trained: r (out + in) scalars a site. Frozen: everything else.

Cost: W * (1 + B A) is built once and multiplied once; the form by rank, sum_k b_k * (W (a_k * x)),
would cost r products with W. An Embedding needs only the rows it looks up: y + y * (B A[:, i]).
Merge: W + W * (B A).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.methods.base import Delta, Layer, Shared, reset_zero_pair
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    """Options of HiRA."""

    method: ClassVar[str] = "hira"

    rank: int = 32
    """Inner dimension r of the factor pair."""

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the factor pair cannot have."""
        check_rank(self.method, self.rank, site)


class HiRA(Delta):
    """A factor pair that multiplies the frozen weight entry by entry."""

    def __init__(self, config: HiRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.kind = site.kind
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the factors as LoRA does."""
        reset_zero_pair(self.A, self.B, self.kind, generator)

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W * (B A)."""
        return weight * (self.B @ self.A)

    @property
    def update(self) -> Any:
        """The path of an Embedding; elsewhere one product with the changed weight is cheaper."""
        return self._rescale if self.kind == "embedding" else None

    def _rescale(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return `y + y * (B A[:, i])` for the looked-up rows y."""
        return y + y * layer.up(layer.down(x, self.A), self.B).to(y.dtype)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in)."""
        return int(config.rank * (out_features + in_features))


register(HiRAConfig, HiRA)
