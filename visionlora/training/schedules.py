"""Learning-rate multipliers as pure functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Callable

from visionlora.errors import ConfigError

Schedule = Callable[[int], float]


def constant(*, warmup: int = 0) -> Schedule:
    """Return a multiplier that rises linearly over `warmup` steps and then stays at 1."""
    _check(warmup=warmup)

    def multiplier(step: int) -> float:
        return _rise(step, warmup)

    return multiplier


def cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Return a multiplier that falls from 1 to `floor` along a half cosine.

    Args:
        steps: total number of steps, warm-up included; the value at `steps` is `floor`.
        warmup: steps of linear rise before the fall.
        floor: final multiplier, that is `eta_min / lr`.
    """
    _check(warmup=warmup)
    if steps <= warmup:
        raise ConfigError(f"a schedule of {steps} steps has no room after {warmup} warm-up steps")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor must lie between 0 and 1, got {floor}")

    def multiplier(step: int) -> float:
        if step < warmup:
            return _rise(step, warmup)
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return multiplier


def _rise(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _check(*, warmup: int) -> None:
    if warmup < 0:
        raise ConfigError(f"warmup must not be negative, got {warmup}")
