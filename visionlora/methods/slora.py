r"""SLoRA: LoRA with a trained matrix between its factors (Guo et al. 2025, arXiv 2502.14482).

    Delta W = s * B N A,   B: out x r,  N: r x r,  A: r x in,   s = alpha / r
    y = W x + b + s * B N (A dropout(x))

Initial values: A uniform in +-1/sqrt(in), N uniform in +-1/sqrt(r), B = 0, so the change starts at
zero; N = 0 instead would leave A and B without a gradient. On an Embedding A = 0 and B is normal,
as in LoRA. The paper's Nystrom start (NLoRA) is another start of the same three matrices: see
`visionlora.init`. Where one begins at a part of W, a constant pair is taken off the change.

Trained: all three, r (out + in) + r^2 scalars a site. Merge: W + s B N A, which is plain LoRA of
rank r with the factors B N and A.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form
from visionlora.methods.base import Shared, reset_zero_pair, uniform
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.registry import register
from visionlora.sites import Site

if TYPE_CHECKING:
    from visionlora.init.base import Start


@dataclass(frozen=True, kw_only=True)
class SLoRAConfig(PairConfig):
    """Options of SLoRA."""

    method: ClassVar[str] = "slora"
    form: ClassVar[Form] = "middle"


class SLoRA(PairDelta):
    """A factor pair with a square matrix in between."""

    def __init__(self, config: SLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.N = nn.Parameter(torch.empty(config.rank, config.rank))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.add_constant(site.in_features)

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A and B as LoRA does, then N."""
        reset_zero_pair(self.A, self.B, self.kind, generator)
        self.N.copy_(uniform(tuple(self.N.shape), self.N.shape[1] ** -0.5, generator))

    def trained_pair(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B N, A)`."""
        return self.B @ self.N, self.A

    def _set(self, start: "Start") -> None:
        """Set the three matrices; without a core N is the identity, once B is set."""
        super()._set(start)
        if start.core is not None:
            self.N.copy_(start.core)
        elif start.up is not None:
            self.N.copy_(torch.eye(len(self.N)))

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in) + r^2."""
        return int(config.rank * (out_features + in_features + config.rank))


register(SLoRAConfig, SLoRA)
