r"""Full: every entry of the weight is trained (baseline of the parameter-efficient methods).

    Delta W = D,   D: out x in;   with `bias=True` also   Delta b = d,   d: out

This is full fine-tuning of the chosen layers written as a change: the frozen weight stays, the
file holds the difference, and it merges and ejects like every other adapter. Decaying D pulls
towards the pretrained weight instead of towards zero.

Initial values: D = 0, d = 0. Trained: out in scalars a site, and out more for a bias. Merge: W + D,
b + d.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.methods.base import Delta, Shared
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Options of full."""

    method: ClassVar[str] = "full"
    form: ClassVar[Form] = "full"

    bias: bool = False
    """Train the bias of the layers that have one too."""


class Full(Delta):
    """A trained matrix of the weight's own size."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: FullConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.D = nn.Parameter(torch.empty(site.out_features, site.in_features))
        self.d = nn.Parameter(torch.empty(site.out_features)) if config.bias and site.bias else None

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set all to zero."""
        for item in self.parameters():
            item.zero_()

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return D."""
        return self.D

    def bias_change(self) -> Float[Tensor, " out"] | None:
        """Return d."""
        return self.d

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return out in, and out for the bias of a layer that has one."""
        return int(out_features * in_features + (out_features if config.bias else 0))

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return the count of a site with or without a bias."""
        return site.out_features * (site.in_features + (config.bias and site.bias))


register(FullConfig, Full)
