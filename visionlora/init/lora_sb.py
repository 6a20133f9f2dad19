r"""LoRA-SB: the change starts as AdamW's first step (Ponkshe et al. 2024, arXiv 2411.19557).

    -eta sign(g) ~ U_r S_r V_r^T,   B = U_r,  A = V_r^T frozen,   R = S_r / s trained
    s B R A: the best approximation of rank r of the first AdamW step of full fine-tuning

g = dL/dW summed over the estimation batches; only its signs matter. Nothing is taken off: training
starts at W + s B R A, and ||s B R A|| <= eta sqrt(out in). Both bases are orthonormal, so with
s = 1 (the default of LoRA-XS: alpha = r, which the authors force) gradient descent on R is the best
that they allow: it moves the weight by -lr P_B g P_A, where P projects on the span of a basis.

eta is the learning rate of full fine-tuning in its first step: `lr`, over `warmup_steps` where the
rate climbs to it, that is `lr / (warmup_ratio * total_steps)`, counted in steps of the optimiser.

Needs the whole gradient, because a sketch of it does not know the signs. Files hold the bases,
which cannot be computed again without the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from visionlora.config import AdapterConfig, Form
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Need, Start
from visionlora.init.gradient import descent
from visionlora.init.spectral import positive_scale
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class LoRASB(Initialiser):
    """The leading part of the sign of the gradient."""

    name: ClassVar[str] = "lora-sb"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    forms: ClassVar[frozenset[Form]] = frozenset({"core"})
    sketchable: ClassVar[bool] = False
    implies: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    lr: float = 1e-4
    """Learning rate of full fine-tuning after its warm-up."""
    warmup_steps: int = 1
    """Optimiser steps until that rate is reached; 1: at once."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.lr > 0:
            raise ConfigError(f"lora-sb: lr must be positive, got {self.lr}")
        if self.warmup_steps < 1:
            raise ConfigError(f"lora-sb: warmup_steps must be at least 1, got {self.warmup_steps}")

    def check(self, config: AdapterConfig) -> None:
        """Refuse a scale that cannot be divided by."""
        positive_scale(self.name, config)

    def start(self, given: Given) -> Start:
        """Return the singular triples of the sign step."""
        U, S, V = truncated_svd(descent(given, self.name).sign(), given.rank, given.where)
        eta = self.lr / self.warmup_steps
        return Start(U, V, torch.diag(S * (eta / given.scale)))


register_initialiser(LoRASB)
register_preset("lora-sb", "lora-xs", "LoRA-XS within the first step of AdamW", "lora-sb")
