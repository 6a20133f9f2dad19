r"""LoRA-GA: the first step is the best step of rank 2r (Wang et al. 2024, arXiv 2407.05000).

    g = dL/dW averaged over batches = U S V^T,   A0 = c V_J^T,   B0 = c U_I,   I and J disjoint
    Delta W = s (B A - B0 A0),   exactly zero at first;   c = out^(1/4) / sqrt(gamma)

I and J share out the first 2r singular triples, by `direction`: ArB2r (default): J the first r, I
the second r; A2rBr: the other way round; ArBr: by turns; `random`. Whatever the split, the first
step of plain gradient descent changes the weight, up to `lr^2 s gB gA`, by

    -lr s (B0 gA + gB A0) = -lr s^2 c^2 g_2r,   g_2r: the best approximation of g of rank 2r

Neither the size nor the sign of g matters. `scale` chooses c: `stable` (above); `unit`: 1; `gd`:
1 / s; `weightS`: the mean of sqrt(S_i / s) over the first r singular values of W.

`norm_clip`: where max |s B0 A0| > max |W|, both factors shrink by the root of the ratio, so that
what is taken off stays within the weight. On by default, with gamma = 64 (both derived): with the
original 16 that pair may be as large as a vision transformer's weight.

Several arms on one A (Block-LoRA; derived): every arm receives the gradient of their sum, so n arms
move n times as far. `A0 = (c / sqrt n) V_J^T` and `B_i = (c / n) U_I` make the steps of both halves
equal again, and the identity holds as above.

Needs r <= min(out, in) / 2 and a positive alpha. Cost: one decomposition a site; files and
checkpoints hold the constant pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visionlora.config import AdapterConfig, Form
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Need, Start
from visionlora.init.gradient import descent
from visionlora.init.spectral import positive_scale
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Initialiser):
    """Singular vectors of the gradient, taken off again."""

    name: ClassVar[str] = "lora-ga"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    forms: ClassVar[frozenset[Form]] = frozenset({"pair", "rescaled", "blocks"})
    implies: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    gamma: float = 64.0
    """The larger, the smaller the factors: `s^2 c^2 = s^2 sqrt(out) / gamma`."""
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which of the first 2r singular triples go to A, which to B."""
    scale: Literal["stable", "unit", "gd", "weightS"] = "stable"
    """Size of the factors."""
    norm_clip: bool = True
    """Whether the product is kept within the largest entry of the weight."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.gamma > 0:
            raise ConfigError(f"lora-ga: gamma must be positive, got {self.gamma}")

    @property
    def residual(self) -> bool:
        """Whether the start is taken off: yes."""
        return True

    def check(self, config: AdapterConfig) -> None:
        """Refuse a scale that cannot be divided by."""
        positive_scale(self.name, config)

    def start(self, given: Given) -> Start:
        """Return singular vectors of the gradient."""
        rank, (rows, columns) = given.rank, given.weight.shape
        if 2 * rank > min(rows, columns):
            raise ConfigError(
                f"lora-ga: rank {rank} is larger than {given.where} allows: the gradient is "
                f"{rows} x {columns} and 2 r of its directions are needed, so at most "
                f"{min(rows, columns) // 2}"
            )
        U, _, V = truncated_svd(descent(given, self.name), 2 * rank, given.where)
        for_A, for_B = self._split(rank, given.generator)
        size = self._size(given)
        up, down = size * U[:, for_B], size / given.arms**0.5 * V[for_A]
        if self.norm_clip:
            shrink = _shrink(given.scale * up @ down, given.weight)
            up, down = shrink * up, shrink * down
        return Start(up, down, taken_off=True)

    def _split(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return which triples go to A and which to B."""
        order = torch.arange(2 * rank)
        if self.direction == "random":
            order = torch.randperm(2 * rank, generator=generator)
        if self.direction == "ArBr":
            return order[1::2], order[0::2]
        first, second = order.chunk(2)
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def _size(self, given: Given) -> float:
        """Return the factor c."""
        if self.scale == "unit":
            return 1.0
        if self.scale == "gd":
            return 1 / given.scale
        if self.scale == "weightS":
            _, S, _ = truncated_svd(given.weight, given.rank, given.where)
            return float((S / given.scale).sqrt().mean())
        return given.weight.shape[0] ** 0.25 / self.gamma**0.5


def _shrink(product: Tensor, weight: Tensor) -> float:
    """Return the factor of both matrices that brings their product within the weight."""
    allowed, largest = float(weight.abs().max()), float(product.abs().max())
    # A weight of zeros bounds nothing: what is taken off is a constant pair of its own.
    return (allowed / largest) ** 0.5 if 0 < allowed < largest else 1.0


register_initialiser(LoRAGA)
register_preset("lora-ga", "lora", "LoRA whose first step is the best of rank 2r", "lora-ga")
