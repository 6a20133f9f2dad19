r"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    Delta W = s * B A,   B: out x r,  A: r x in,   s = alpha / r   (rsLoRA: alpha / sqrt(r))
    y = W x + b + s * B (A dropout(x))

Initial values: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5) and B = 0, so that the change is
zero. `visionlora.init` has other starts; where one begins at a part of W, a constant pair is taken
off the change (`visionlora.methods.parts.pair`), and W is never touched. Dropout acts on the whole
change then, so that it disturbs nothing at first (derived).

Trained: A and B, r (out + in) scalars a site. Frozen: everything else.
Merge: W + Delta W. On an Embedding the roles swap, as in the reference implementations: A = 0 and B
normal, because A holds one column per token and B is shared by all of them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form
from visionlora.methods.base import Shared, reset_zero_pair
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.registry import register, register_preset
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(PairConfig):
    """Options of LoRA."""

    method: ClassVar[str] = "lora"
    form: ClassVar[Form] = "pair"


class LoRA(PairDelta):
    """One factor pair."""

    def __init__(self, config: LoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.add_constant(site.in_features)

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A, set B to zero (on an Embedding the other way round)."""
        reset_zero_pair(self.A, self.B, self.kind, generator)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in)."""
        return int(config.rank * (out_features + in_features))


register(LoRAConfig, LoRA)
register_preset("rslora", "lora", "LoRA with s = alpha / sqrt(r)", scaling="rslora")
register_preset("lorat", "lora", "LoRA with both factors from N(0, 0.02^2)", "normal")
register_preset("pissa", "lora", "LoRA that starts as the largest singular triples", "pissa")
register_preset("olora", "lora", "LoRA that starts as the first part of the QR", "olora")
