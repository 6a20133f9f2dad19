r"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    Delta W = s * B A,   B: out x r,  A: r x in,   s = alpha / r   (rsLoRA: alpha / sqrt(r))
    y = W x + b + s * B (A dropout(x))

Initial values: `init="zero"`: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5) and B = 0, so
that the change is zero. `init="normal"`: both factors from N(0, 0.02^2), as LoRAT trains its
trackers (Lin et al. 2024, arXiv 2403.05231); the change is then small but not zero.

Trained: A and B, r (out + in) scalars a site. Frozen: everything else.
Merge: W + s B A. On an Embedding the roles swap, as in the reference implementations: A = 0 and B
normal, because A holds one column per token and B is shared by all of them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.methods.base import Delta, Shared, reset_zero_pair
from visionlora.registry import register, register_preset
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Options of LoRA."""

    method: ClassVar[str] = "lora"

    init: Literal["zero", "normal"] = "zero"
    """`zero`: the change starts at zero. `normal`: both factors from N(0, 0.02^2)."""


class LoRA(Delta):
    """One factor pair."""

    def __init__(self, config: LoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "zero"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A and B as the module docstring says."""
        if self.options.init == "normal":
            self.A.copy_(torch.empty(self.A.shape).normal_(0.0, 0.02, generator=generator))
            self.B.copy_(torch.empty(self.B.shape).normal_(0.0, 0.02, generator=generator))
        else:
            reset_zero_pair(self.A, self.B, self.kind, generator)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`."""
        return self.B, self.A

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in)."""
        return int(config.rank * (out_features + in_features))


register(LoRAConfig, LoRA)
register_preset("rslora", "lora", "LoRA with s = alpha / sqrt(r)", scaling="rslora")
register_preset("lorat", "lora", "LoRA with both factors from N(0, 0.02^2)", init="normal")
