"""Optimiser and schedule of LoRAT.

    AdamW, decay .1 but for T, biases, norms, and the last score layer (1 x d)
    lr: 1e-7 -> 1e-4 linearly over the warm-up, then 1e-6 + (1e-4 - 1e-6) (1 + cos(pi t / T)) / 2

`t` counts from the end of the warm-up and `T` is all steps, the warm-up's included, so the cosine
stops that much before its end, as timm's `warmup_prefix` has it. What a method declares about its
own tensors (a larger rate, no decay) stays.

Lin et al. 2024, arXiv:2403.05231, and the official configuration.
"""

import math

import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.training.schedules import Schedule

BETAS = (0.9, 0.999)
NO_DECAY = "embed"
"""Parameters with this in their names do not decay."""


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return the optimiser over everything trainable in a tracker with its adapter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in vl.parameter_groups(model, lr=lr, weight_decay=weight_decay):
        for decays in (True, False):
            chosen = [p for p in group["params"] if _decays(names[id(p)], p) is decays]
            if chosen:
                decay = group["weight_decay"] if decays else 0.0
                groups.append({**group, "params": chosen, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=BETAS)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a matrix, one of a single row not being one."""
    return NO_DECAY not in name and sum(side > 1 for side in parameter.shape) > 1


def prefixed_cosine(steps: int, *, warmup: int, start: float, floor: float) -> Schedule:
    """Return the schedule as a multiplier of the learning rate.

    Args:
        steps: all steps, the warm-up's included.
        warmup: steps of linear rise.
        start: multiplier at step 0.
        floor: multiplier at the cosine's end.

    Raises:
        ConfigError: a warm-up that takes all steps, or multipliers outside [0, 1].
    """
    if not 0 <= warmup < steps:
        raise ConfigError(f"a warm-up of {warmup} steps does not fit into {steps} steps")
    if not (0 <= start <= 1 and 0 <= floor <= 1):
        raise ConfigError(f"start and floor must lie between 0 and 1, got {start} and {floor}")

    def multiplier(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * step / warmup
        return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / steps)) / 2

    return multiplier
