r"""Projected gradients between frozen factors (Wang et al. 2024, arXiv 2407.18242).

Where a factor never moves, the step of the others that is closest to the gradient g of the weight
has a closed form, which replaces their gradient before the optimiser sees it:

    LoRA-FA, s B A, A frozen:            gB <- gB (A A^T)^-1 / s^2,                 E = g P_A
    LoRA-XS, s B R A, B and A frozen:    gR <- (B^T B)^-1 gR (A A^T)^-1 / s^2,      E = P_B g P_A

E is the change of the weight per unit of step, P the projection onto the rows of A and the columns
of B. The first is what LoRA-Pro becomes at B = 0 and what PEFT's optimiser for LoRA-FA does; the
paper of LoRA-FA trains without it (Zhang et al. 2023, arXiv 2308.03303). The second undoes the
singular values in LoRA-XS's A, by which some entries of R move the weight more than others; between
orthonormal bases with s = 1 (LoRA-SB) it changes nothing.

Gram matrices are regularised by `ridge` times their mean eigenvalue, as in
`visionlora.dynamics.equivalent`.
No state; O(r^2 (m + n) + r^3) operations a site and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.equivalent import gram
from visionlora.dynamics.places import check_places, trained_places
from visionlora.errors import ConfigError
from visionlora.ranks.structure import Place
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class ProjectedConfig(DynamicsConfig):
    """Options of projected gradients."""

    name: ClassVar[str] = "projected"
    forms: ClassVar[frozenset[Form] | None] = frozenset({"frozen-down", "core"})
    why: ClassVar[str] = "it projects onto frozen factors; for two trained ones there is 'lora-pro'"

    ridge: float = 1e-6
    """Regularisation of the Gram matrices, relative to their mean eigenvalue."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.ridge < 0:
            raise ConfigError(f"projected: ridge must not be negative, got {self.ridge}")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse a scale of zero."""
        if not getattr(config, "scale", 1.0):
            raise ConfigError("projected needs an alpha other than 0: it divides by the scale")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "Projected":
        """Return the dynamics for the trained adapters of a model."""
        places = trained_places(model)
        check_places(self, places)
        return Projected(places, self.ridge)


class Projected(Dynamics):
    """Replaces the gradients of what trains between frozen factors."""

    name = "projected"

    def __init__(self, places: list[Place], ridge: float) -> None:
        self.places = places
        self.ridge = ridge

    @torch.no_grad()
    def on_grads_clipped(self, context: StepContext) -> None:
        """Project the gradients."""
        for place in self.places:
            scale = place.delta.scale * place.host.state.strengths[place.adapter]
            for name, parameter in place.delta.named_parameters():
                if parameter.grad is not None and scale:
                    # A new tensor: GGPO measures the gradient as it was.
                    parameter.grad = self._projected(parameter.grad, place, name, scale)

    def _projected(self, gradient: Tensor, place: Place, name: str, scale: float) -> Tensor:
        """Return the projected gradient of B or R."""
        frozen = place.delta.frozen()
        result = gradient @ self._inverse(frozen["A"]).to(gradient.dtype)
        if name == "R":
            result = self._inverse(frozen["B"].t()).to(gradient.dtype) @ result
        return result.mul_(scale**-2)

    def _inverse(self, factor: Tensor) -> Tensor:
        return gram(factor, self.ridge).inverse


register_dynamics(ProjectedConfig)
register_preset(
    "lora-fa-pro", "lora-fa", "LoRA-FA with the gradient that is best for the weight", "projected"
)
register_preset(
    "lora-xs-pro", "lora-xs", "LoRA-XS with the gradient that is best for the weight", "projected"
)
