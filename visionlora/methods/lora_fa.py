r"""LoRA-FA: LoRA with a frozen down-projection (Zhang et al. 2023, arXiv 2308.03303).

    Delta W = s * B A,   B: out x r trained,  A: r x in random and frozen,   s = alpha / r

Because A is not trained, the layer's input need not be kept for backward: only `h = A x`, of width
r. Initial values: A uniform in +-1/sqrt(in) from the seeded generator, B = 0.
Trained: r * out scalars a site. A is not stored in files: it is drawn again from the seed, and a
fingerprint of it is compared. Merge: W + s B A.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form, LowRankConfig
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(LowRankConfig):
    """Options of LoRA-FA."""

    method: ClassVar[str] = "lora-fa"
    form: ClassVar[Form] = "frozen-down"


class LoRAFA(Delta):
    """A trained up-projection on a frozen random down-projection."""

    A: Tensor

    def __init__(self, config: LoRAFAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.register_buffer("A", torch.empty(config.rank, site.in_features), persistent=False)
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A, set B to zero."""
        self.A.copy_(uniform(tuple(self.A.shape), self.A.shape[1] ** -0.5, generator))
        self.B.zero_()

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`."""
        return self.B, self.A

    def frozen(self) -> dict[str, Tensor]:
        """The down-projection."""
        return {"A": self.A}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r * out."""
        return int(config.rank * out_features)


register(LoRAFAConfig, LoRAFA)
