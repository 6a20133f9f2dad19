r"""Norm tuning: the affine weight and bias of norms only (Zhao et al. 2023, arXiv 2312.11420).

    Delta w = g,   Delta b = d,   g, d: the number of features

Serves LayerNorm, GroupNorm, BatchNorm and RMSNorm with an affine weight; d is missing where the
norm has no bias. Running statistics are the layer's own. Initial values: g = 0, d = 0. Trained: 2
scalars a feature, 1 without bias. Merge: w + g, b + d.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.methods.base import Delta, Shared
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class NormConfig(AdapterConfig):
    """Options of norm tuning: none."""

    method: ClassVar[str] = "norm"
    kinds: ClassVar[frozenset[str]] = frozenset({"norm"})


class Norm(Delta):
    """A trained change of the affine part of a norm."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: NormConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.g = nn.Parameter(torch.empty(site.out_features))
        self.d = nn.Parameter(torch.empty(site.out_features)) if site.bias else None

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set all to zero."""
        for item in self.parameters():
            item.zero_()

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return g as a column."""
        return self.g[:, None]

    def bias_change(self) -> Float[Tensor, " out"] | None:
        """Return d."""
        return self.d

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 2 scalars a feature."""
        return 2 * out_features

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return 2 scalars a feature, or 1 without bias."""
        return site.out_features * (2 if site.bias else 1)


register(NormConfig, Norm)
