r"""LoRA+: the up-matrix learns faster than the down-matrix (Hayou et al. 2024, arXiv 2402.12354).

    lr(B) = ratio * lr(A),   ratio = 16

In a wide layer A and B of one rate cannot both move the output by the right amount: B, which
starts at zero, learns too slowly. The factors get optimiser groups of their own; what the schedule
and the warm-up do to A they do to B.

As in PEFT one-dimensional tensors of an adapter, such as DoRA's magnitude, go with B, and here do
not decay; heads, biases and norms stay as they are. SLoRA's middle matrix goes with A, and the pair
of an Embedding stays as it is, because its output is no sum over many inputs (both derived).

No cost: the dynamics only regroups the optimiser when the run begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.places import check_places, trained_places
from visionlora.errors import ConfigError
from visionlora.ranks.optimizer import group_of, move
from visionlora.ranks.structure import Place
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class LoRAPlusConfig(DynamicsConfig):
    """Options of LoRA+."""

    name: ClassVar[str] = "lora+"
    forms: ClassVar[frozenset[Form] | None] = frozenset({"pair", "rescaled", "blocks", "middle"})
    why: ClassVar[str] = "it sets the rate of B against that of A, so both must train"

    ratio: float = 16.0
    """Learning rate of B as a multiple of that of A."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.ratio > 0:
            raise ConfigError(f"lora+: ratio must be positive, got {self.ratio}")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse dynamics that solve for one common step of A and B."""
        if any(other.name == "lora-pro" for other in others):
            raise ConfigError(
                "lora+ cannot be combined with lora-pro: another rate for B than for A breaks the "
                "step of the weight that lora-pro solves for"
            )

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "LoRAPlus":
        """Regroup the optimiser.

        Raises:
            ConfigError: no adapter trains, one has no pair, or the optimiser does not hold it.
        """
        places = trained_places(model)
        check_places(self, places)
        fast = [item for place in places for item in _fast(place)]
        rates = {id(item): _rate(optimizer, item) for item in fast}
        for rate in dict.fromkeys(rates.values()):
            own = [item for item in fast if rates[id(item)] == rate]
            matrices = [item for item in own if item.dim() > 1]
            vectors = [item for item in own if item.dim() <= 1]
            move(optimizer, matrices, lr=self.ratio * rate)
            move(optimizer, vectors, lr=self.ratio * rate, weight_decay=0.0)
        return LoRAPlus()


class LoRAPlus(Dynamics):
    """Nothing is left to do once the optimiser is regrouped."""

    name = "lora+"


def _fast(place: Place) -> list[nn.Parameter]:
    """Return what learns at the higher rate."""
    if place.site.kind == "embedding":
        return []
    return [
        item
        for name, item in place.delta.named_parameters()
        if item.requires_grad and (name == "B" or item.dim() <= 1)
    ]


def _rate(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    """Return the learning rate at multiplier 1."""
    group = group_of(optimizer, parameter)
    return float(group["initial_lr"] if "initial_lr" in group else group["lr"])


register_dynamics(LoRAPlusConfig)
register_preset("lora+", "lora", "LoRA whose up-matrix learns 16 times faster", "lora+")
