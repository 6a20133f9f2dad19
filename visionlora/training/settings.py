"""Settings of the shared training loop."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from visionlora.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how precisely and with which records a model is trained."""

    steps: int
    """Number of optimiser steps."""
    accumulate: int = 1
    """Micro-batches per step; the step uses the mean of their losses."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward; parameters and optimiser keep their own."""
    clip_norm: float | None = None
    """Largest global gradient norm."""
    checkpoint_every: int = 0
    """Steps between checkpoints, 0 for none except on an interrupt."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Tracker beside log.jsonl."""
    max_skipped: int = 10
    """Non-finite steps in a row that end the training."""
    seed: int = 0
    """Seed of the random numbers drawn while training, such as dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive or null, got {self.clip_norm}")
        hints = get_type_hints(type(self))
        for name in ("precision", "tracker"):
            value, allowed = getattr(self, name), get_args(hints[name])
            if value not in allowed:
                hint = nearest(str(value), allowed)
                raise ConfigError(f"{name} {value!r} is none of {', '.join(allowed)}{hint}")


_LEAST = {
    "steps": 1,
    "accumulate": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "log_every": 1,
    "max_skipped": 1,
    "seed": 0,
}
