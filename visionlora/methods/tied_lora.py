r"""Tied-LoRA: one factor pair per shape of layer (Renduchintala et al. 2023, arXiv 2311.09578).

    Delta W_l = s * diag(u_l) B diag(v_l) A,   u_l: out,  v_l: r;   B: out x r,  A: r x in
    y = W_l x + b + s * u_l * (B (v_l * (A dropout(x)))),   s = alpha / r

A and B are trained and tied: every site of the same (out, in) has the same pair. The vectors u_l
and v_l are trained too, and every site has its own.

Initial values (derived): A uniform in +-1/sqrt(in), B = 0, u = v = 1, so the change starts at zero
and the first step is that of a LoRA whose pair all sites share. If the sites of a shape are
embeddings, A = 0 and B is normal, as in LoRA.

Trained: r (out + in) scalars a shape, and out + r a site. Frozen: nothing but the weights.
Merge: W + Delta W, plain LoRA of rank r.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.methods.base import Delta, Shared, reset_zero_pair
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class TiedLoRAConfig(LowRankConfig):
    """Options of Tied-LoRA."""

    method: ClassVar[str] = "tied-lora"


class TiedPairs(Shared):
    """The trained pairs `A: r x in` and `B: out x r`, one for every shape."""

    def __init__(self, config: TiedLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        for shape, site in _shapes(sites).items():
            A = torch.empty(config.rank, site.in_features)
            B = torch.empty(site.out_features, config.rank)
            generator = named_generator(config.seed, f"tied-lora {shape}")
            reset_zero_pair(A, B, site.kind, generator)
            self.A[shape], self.B[shape] = nn.Parameter(A), nn.Parameter(B)

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return the sum of r (out + in) over the distinct shapes."""
        return sum(
            int(config.rank * (site.out_features + site.in_features))
            for site in _shapes(sites).values()
        )


class TiedLoRA(Delta):
    """Two trained vectors around the pair of the site's shape."""

    def __init__(self, config: TiedLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.shape = _shape(site)
        self.u = nn.Parameter(torch.empty(site.out_features))
        self.v = nn.Parameter(torch.empty(config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set both vectors to one."""
        self.u.fill_(1.0)
        self.v.fill_(1.0)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(diag(u) B diag(v), A)`."""
        (pairs,) = self.shared
        assert isinstance(pairs, TiedPairs)
        return self.u[:, None] * pairs.B[self.shape] * self.v, pairs.A[self.shape]

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return out + r."""
        return int(out_features + config.rank)


def _shape(site: Site) -> str:
    return f"{site.out_features}x{site.in_features}"


def _shapes(sites: list[Site]) -> dict[str, Site]:
    """Return the first site of every shape."""
    found: dict[str, Site] = {}
    for site in sites:
        found.setdefault(_shape(site), site)
    return found


register(TiedLoRAConfig, TiedLoRA, TiedPairs)
