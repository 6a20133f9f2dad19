r"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    Delta W = s * B A,   B: out x r,  A: r x in,   s = alpha / r   (rsLoRA: alpha / sqrt(r))
    y = W x + b + s * B (A dropout(x))

Initial values: `init="zero"`: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5) and B = 0, so
that the change is zero. `init="normal"`: both factors from N(0, 0.02^2), as LoRAT trains its
trackers (Lin et al. 2024, arXiv 2403.05231); the change is then small but not zero.

`init="pissa"` and `init="olora"`: A and B start at a pair A0, B0 that is a part of W, its largest
singular triples or the first columns of its QR (`visionlora.methods.parts.residual`), and

    Delta W = s * (B A - B0 A0),   exactly zero at first

W is never touched. A0 and B0 are computed again from it when a file is loaded (float64, fixed
signs), and their fingerprint is compared; `save(..., frozen=True)` stores them. Exported, such a
change is plain LoRA of rank 2 r. Dropout acts on the whole change, so that it disturbs nothing at
first (derived).

Trained: A and B, r (out + in) scalars a site. Frozen: everything else.
Merge: W + Delta W. On an Embedding the roles swap, as in the reference implementations: A = 0 and B
normal, because A holds one column per token and B is shared by all of them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, reset_zero_pair
from visionlora.methods.parts.residual import difference, initial_pair
from visionlora.registry import register, register_preset
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Options of LoRA."""

    method: ClassVar[str] = "lora"

    init: Literal["zero", "normal", "pissa", "olora"] = "zero"
    """`zero`: the change starts at zero. `normal`: both factors from N(0, 0.02^2). `pissa`,
    `olora`: the pair starts as a part of the weight, which is taken off again."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.residual and not self.scale > 0:
            raise ConfigError(
                f"{self.method}: init={self.init!r} needs a positive alpha, got {self.alpha}"
            )

    @property
    def residual(self) -> bool:
        """Whether the initial pair is taken off the change."""
        return self.init in ("pissa", "olora")

    def meaning(self) -> dict[str, Any]:
        """Return the options of the function: the initial pair is part of it if taken off."""
        return {**super().meaning(), "init": self.init if self.residual else "zero or normal"}


class LoRA(Delta):
    """One factor pair."""

    A0: Tensor
    B0: Tensor

    def __init__(self, config: LoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        self.where = site.name or "the layer"
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        if config.residual:
            self.register_buffer("A0", torch.empty(self.A.shape), persistent=False)
            self.register_buffer("B0", torch.empty(self.B.shape), persistent=False)

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init != "normal"

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """Whether the initial values depend on the seed."""
        return not self.options.residual

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set A and B as the module docstring says."""
        options = self.options
        if options.residual:
            B, A = initial_pair(options.init, weight, options.rank, self.scale, self.where)
            for value, tensors in ((A, (self.A, self.A0)), (B, (self.B, self.B0))):
                for tensor in tensors:
                    tensor.copy_(value)
        elif options.init == "normal":
            self.A.copy_(torch.empty(self.A.shape).normal_(0.0, 0.02, generator=generator))
            self.B.copy_(torch.empty(self.B.shape).normal_(0.0, 0.02, generator=generator))
        else:
            reset_zero_pair(self.A, self.B, self.kind, generator)

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Return `(B, A)`, or a pair of twice the rank where an initial pair is taken off."""
        if self.options.residual:
            return difference(self.B, self.A, self.B0, self.A0)
        return self.B, self.A

    def frozen(self) -> dict[str, Tensor]:
        """The initial pair, where it is taken off."""
        return {"A0": self.A0, "B0": self.B0} if self.options.residual else {}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in)."""
        return int(config.rank * (out_features + in_features))


register(LoRAConfig, LoRA)
register_preset("rslora", "lora", "LoRA with s = alpha / sqrt(r)", scaling="rslora")
register_preset("lorat", "lora", "LoRA with both factors from N(0, 0.02^2)", init="normal")
register_preset("pissa", "lora", "LoRA that starts as the largest singular triples", init="pissa")
register_preset("olora", "lora", "LoRA that starts as the first part of the QR", init="olora")
