r"""BitFit: bias terms only (Ben Zaken et al. 2022, arXiv 2106.10199).

    Delta W = 0,   Delta b = d,   d: out

Serves linear layers, their slices, convolutions and norms that have a bias; a site without one is
refused. Initial values: d = 0. Trained: out scalars a site. Merge: b + d.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Options of BitFit: none."""

    method: ClassVar[str] = "bitfit"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm"})

    def check_site(self, site: Site) -> None:
        """Refuse a layer without bias."""
        if not site.bias:
            raise ConfigError(
                f"bitfit: {site.name or 'the layer'} has no bias to train; exclude it"
            )


class BitFit(Delta):
    """A trained change of the bias."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: BitFitConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.in_features = site.in_features
        self.d = nn.Parameter(torch.empty(site.out_features))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set d to zero."""
        self.d.zero_()

    def factors(self) -> tuple[Float[Tensor, "out 0"], Float[Tensor, "0 in"]]:
        """Return a pair of rank 0: the weight does not change."""
        return self.d.new_empty(len(self.d), 0), self.d.new_empty(0, self.in_features)

    def bias_change(self) -> Float[Tensor, " out"]:
        """Return d."""
        return self.d

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return out."""
        return out_features


register(BitFitConfig, BitFit)
