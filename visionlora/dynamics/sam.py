r"""SAM: sharpness-aware minimisation of the adapter (Foret et al. 2020, arXiv 2010.01412).

With phi all trained tensors of the adapters and one norm over all of them,

    g = grad L(phi),   phi' = phi + rho g / (|g| + 1e-12),   gs = grad L(phi')

and the optimiser steps from phi, put back bit for bit, with

    sam:      gs
    mix:      (1 - b) g + b gs           to first order grad(L + b rho |grad L|)
    project:  g - b min(0, <g, gs>) / |gs|^2 gs

On a quadratic with Hessian H, gs = g + rho H g / |g| exactly, and grad |g| = H g / |g|; so `mix`
penalises the norm of the gradient with the factor b rho. `project` takes out of g what would
increase the loss at phi' (derived); with b = 1 the result is orthogonal to gs if the two disagree.

Defaults: rho = 0.05, b = 1. The second pass repeats the micro-batches, with the dropout masks of
the first and without touching running statistics; a head keeps its first gradient (derived). Where
an adapter starts with B = 0 the gradient of A is zero, so that the first move is one of B alone.

Cost: two forwards and backwards a step, and copies of phi and g; nothing at inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.perturbed import Combine, SecondLook
from visionlora.errors import ConfigError
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class SAMConfig(DynamicsConfig):
    """Options of SAM."""

    name: ClassVar[str] = "sam"
    looks_twice: ClassVar[bool] = True

    rho: float = 0.05
    """Length of the move uphill."""
    mode: Literal["sam", "mix", "project"] = "sam"
    """How the two gradients are combined."""
    weight: float = 1.0
    """b of `mix` and `project`."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        check_ranges(self.name, rho=self.rho, weight=self.weight)
        if self.mode == "sam" and self.weight != 1.0:
            raise ConfigError(
                f"sam: weight belongs to the modes 'mix' and 'project', got weight={self.weight} "
                "with mode='sam'"
            )

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> SecondLook:
        """Return the dynamics for a run."""
        combine = projected(self.weight) if self.mode == "project" else mixed(self.weight)
        return SecondLook(
            self.name, model, optimizer, radius=lambda step: self.rho, combine=combine
        )


def mixed(weight: float) -> Combine:
    """Return the rule `(1 - weight) g + weight gs`, exact at both ends."""

    def combine(first: list[Tensor], second: list[Tensor]) -> Sequence[Tensor]:
        return torch._foreach_lerp(first, second, weight)

    return combine


def projected(weight: float) -> Combine:
    """Return the rule that takes out of g what gs objects to."""

    def combine(first: list[Tensor], second: list[Tensor]) -> Sequence[Tensor]:
        product, square = inner(first, second), inner(second, second)
        if not product < 0:
            return first
        return torch._foreach_add(first, second, alpha=-weight * product / square)

    return combine


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors."""
    return float(torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum())


def check_ranges(name: str, *, rho: float, weight: float) -> None:
    """Refuse a negative radius and a weight outside of [0, 1]."""
    if rho < 0:
        raise ConfigError(f"{name}: rho must not be negative, got {rho}")
    if not 0 <= weight <= 1:
        raise ConfigError(f"{name}: weight must lie in [0, 1], got {weight}")


register_dynamics(SAMConfig)
register_preset("sam", "lora", "LoRA with sharpness-aware minimisation", "sam")
