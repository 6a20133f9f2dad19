"""The options of a training dynamics, what it can be combined with, and how it is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from visionlora.config import AdapterConfig, Form, check_fields
from visionlora.dynamics.base import Dynamics


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """Base of the options of all dynamics; options are dataclass fields."""

    name: ClassVar[str] = ""
    """Registered name."""
    forms: ClassVar[frozenset[Form] | None] = None
    """Forms of method that it can train; None for all."""
    why: ClassVar[str] = "its step is defined for a factor pair"
    """Reason for refusing other forms."""
    looks_twice: ClassVar[bool] = False
    """Moves the parameters for a second look at the loss; at most one of a run may."""
    freezes: ClassVar[bool] = False
    """Freezes parameters as soon as it is built, so it is built after those that look for them."""
    implies: ClassVar[Mapping[str, Any]] = {}
    """Options of the method that it asks for, where the method has them and the user is silent."""

    def __post_init__(self) -> None:
        """Check the types of all options."""
        check_fields(self)

    def check(self, config: AdapterConfig, others: "Sequence[DynamicsConfig]") -> None:
        """Raise `ConfigError`, with the reason, for what it cannot be combined with.

        Args:
            config: the method.
            others: the other dynamics of the run.
        """

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Dynamics:
        """Return the dynamics of one run.

        Args:
            model: the model with its adapter, outside of any data-parallel wrapper.
            optimizer: the optimiser of the run, over all parameters that may train.
            steps: length of the run.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return name and options on one line."""
        shown = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{self.name}({shown})" if shown else self.name
