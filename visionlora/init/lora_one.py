r"""LoRA-One: the pair starts as one step of gradient descent (Zhang et al. 2025, arXiv 2502.01235).

    -g = U S V^T,   B0 = U_r sqrt(S_r / (gamma S_1)),   A0 = sqrt(S_r / (gamma S_1)) V_r^T
    s B0 A0 = -s / (gamma S_1) g_r,   g_r: the best approximation of g = dL/dW of rank r

Nothing is taken off: training starts at W + s B0 A0, one truncated step down the gradient, whose
length gamma = 128 sets whatever the size of g. The factors are balanced, `B0^T B0 = A0 A0^T`. Taken
from the authors' code; their description has neither the root nor S_1.

Around a matrix that is trained as well (SLoRA) N = I. For n arms on one A (Block-LoRA; derived) the
change is the same, and balanced as training sees it, where the arms together move n times as far:
their sum is n^(1/4) times as large as above, A n^(1/4) times as small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Need, Start
from visionlora.init.gradient import descent
from visionlora.init.spectral import positive_scale
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class LoRAOne(Initialiser):
    """The leading part of minus the gradient."""

    name: ClassVar[str] = "lora-one"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    implies: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    gamma: float = 128.0
    """The larger, the shorter the step."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.gamma > 0:
            raise ConfigError(f"lora-one: gamma must be positive, got {self.gamma}")

    def check(self, config: AdapterConfig) -> None:
        """Refuse a scale that would turn the step around."""
        positive_scale(self.name, config)

    def start(self, given: Given) -> Start:
        """Return the leading triples of minus the gradient, their values shared out evenly."""
        U, S, V = truncated_svd(descent(given, self.name), given.rank, given.where)
        root = (S / (S[0] * self.gamma)).sqrt()
        balance = given.arms**0.25
        return Start(U * (balance * root), (root / balance)[:, None] * V)


register_initialiser(LoRAOne)
register_preset("lora-one", "lora", "LoRA that starts as one step of descent", "lora-one")
