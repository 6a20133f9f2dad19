r"""LoRA-XS: a small trained core between singular vectors (Balazy et al. 2024, arXiv 2405.17604).

    Delta W = s * B R A,   B = U_r: out x r,  A = S_r V_r^T: r x in frozen;   R: r x r trained
    y = W x + b + s * B R (A dropout(x)),   W = U S V^T,   s = alpha / r

B has orthonormal columns and B A is the best approximation of W of rank r. The singular values sit
on the input side, as in the reference implementation.

Initial values: `init="normal"`: R from N(0, (1e-5)^2), almost no change. `init="zero"`: R = 0 and
no change at all; R has the same gradient there.

Trained: r^2 scalars a site, whatever its shape. Files hold R; A and B are computed again from the
frozen weight (float64, fixed signs) and their fingerprint is compared. Where singular values are
equal or nearly so, the vectors are not determined, and another machine or a base model in another
precision may find other ones: such a file is refused with the advice to save with
`save(..., frozen=True)`, which stores A and B. Merge: W + s B R A.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form, LowRankConfig
from visionlora.methods.base import Delta, Shared
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register
from visionlora.sites import Site

if TYPE_CHECKING:
    from visionlora.init.base import Start


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(LowRankConfig):
    """Options of LoRA-XS."""

    method: ClassVar[str] = "lora-xs"
    form: ClassVar[Form] = "core"

    init: Literal["normal", "zero"] = "normal"
    """`normal`: R from N(0, (1e-5)^2). `zero`: R = 0, so that nothing changes at first."""


class LoRAXS(Delta):
    """A trained core between frozen singular vectors."""

    A: Tensor
    B: Tensor

    def __init__(self, config: LoRAXSConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.where = site.name or "the layer"
        self.R = nn.Parameter(torch.empty(config.rank, config.rank))
        A, B = (
            torch.empty(config.rank, site.in_features),
            torch.empty(site.out_features, config.rank),
        )
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "zero"

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """Whether the initial values depend on the seed."""
        return self.options.init == "normal"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Decompose the weight and set R."""
        U, S, V = truncated_svd(weight, self.options.rank, self.where)
        self.A.copy_(S[:, None] * V)
        self.B.copy_(U)
        if self.options.init == "normal":
            self.R.copy_(torch.empty(self.R.shape).normal_(0.0, 1e-5, generator=generator))
        else:
            self.R.zero_()

    @torch.no_grad()
    def begin(self, start: "Start", weight: Float[Tensor, "out in"]) -> None:
        """Take other bases and another core; bases that follow from data are kept in files."""
        for value, tensor in ((start.up, self.B), (start.down, self.A), (start.core, self.R)):
            if value is not None:
                tensor.copy_(value)
        self.carried = self.carried or start.up is not None or start.down is not None

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B R, A)`."""
        return self.B @ self.R, self.A

    def frozen(self) -> dict[str, Tensor]:
        """Both factors of the weight."""
        return {"A": self.A, "B": self.B}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r^2."""
        return int(config.rank**2)


register(LoRAXSConfig, LoRAXS)
