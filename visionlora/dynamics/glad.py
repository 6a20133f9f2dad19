r"""GLAD: LoRA with a regularised gradient (Peng et al. 2025, arXiv 2507.13089).

    g0 = grad L(phi),   phi' = phi + (rho / (|g0| + 1e-12) - alpha) g0,   g1 = grad L(phi')
    g  = (1 - lambda) g0 + lambda g1

phi are all trained tensors of all adapters and nothing else, |g0| is one norm over all of them, and
the optimiser steps with g from phi, put back bit for bit. The option `weight` is lambda: 0 is plain
training, 1 is SAM. To first order g is the gradient of L + lambda rho |grad L|, so the norm of the
gradient is penalised.

Derived: only the paper's abstract and the caption of its first figure could be read: a regulariser
of the gradient, in which that of SAM is the reference that steers the original one. The rule above
is the one of SAGM (2023, arXiv 2303.10353), whose offset is `alpha` (0.001 there, 0 here);
`sam(mode=project)` is another reading. A head keeps its first gradient.

Defaults: rho = 0.05, lambda = 0.5, alpha = 0, in every step. `every = n` looks twice in each n-th
step only; `warmup` is the fraction of the run over which rho rises linearly.

Cost: two forwards and backwards in a step that looks twice, and copies of phi and g0; nothing at
inference.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.perturbed import SecondLook
from visionlora.dynamics.sam import check_ranges, mixed
from visionlora.errors import ConfigError
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class GLADConfig(DynamicsConfig):
    """Options of GLAD."""

    name: ClassVar[str] = "glad"
    looks_twice: ClassVar[bool] = True

    rho: float = 0.05
    """Length of the move uphill."""
    weight: float = 0.5
    """lambda, the weight of the second gradient."""
    alpha: float = 0.0
    """What is taken off the factor of the move."""
    every: int = 1
    """Steps from one second look to the next."""
    warmup: float = 0.0
    """Fraction of the run over which rho rises."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        check_ranges(self.name, rho=self.rho, weight=self.weight)
        if self.every < 1:
            raise ConfigError(f"glad: every must be at least 1, got {self.every}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"glad: warmup must lie in [0, 1], got {self.warmup}")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> SecondLook:
        """Return the dynamics for a run."""

        def radius(step: int) -> float | None:
            if step % self.every:
                return None
            rising = self.warmup * steps
            return self.rho * (min(1.0, (step + 1) / rising) if rising else 1.0)

        return SecondLook(
            self.name,
            model,
            optimizer,
            radius=radius,
            combine=mixed(self.weight),
            offset=self.alpha,
        )


register_dynamics(GLADConfig)
register_preset("glad", "lora", "LoRA with a regularised gradient", "glad")
