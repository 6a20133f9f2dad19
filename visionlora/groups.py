"""Optimiser groups: which learning rate and decay each trained tensor gets.

Methods declare exceptions by parameter name (`Delta.groups`, `Shared.groups`), for instance gates
that learn faster and do not decay; everything else follows the run.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from visionlora.api import trainable_parameters
from visionlora.errors import ConfigError, NeverTrainedError
from visionlora.methods.base import Delta, Group, Shared


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimiser over everything that is trainable.

    Args:
        model: a model with adapters.
        lr: learning rate of the run; a method may multiply it for some of its tensors.
        weight_decay: decay of the run; a method may exempt some of its tensors.

    Raises:
        ConfigError: a rate that is not positive, or a negative decay.
        NeverTrainedError: nothing is trainable.
    """
    if not lr > 0 or weight_decay < 0:
        raise ConfigError(
            f"lr must be positive and weight_decay not negative, got {lr} and {weight_decay}"
        )
    declared = dict(_declared(model))
    found: dict[Group, list[nn.Parameter]] = {}
    for _, parameter in trainable_parameters(model):
        found.setdefault(declared.get(id(parameter), Group()), []).append(parameter)
    if not found:
        raise NeverTrainedError("nothing in the model is trainable")
    return [
        {
            "params": parameters,
            "lr": lr * group.lr,
            "weight_decay": weight_decay if group.decay else 0.0,
        }
        for group, parameters in found.items()
    ]


def _declared(model: nn.Module) -> Iterator[tuple[int, Group]]:
    """Yield `(id of the parameter, its group)` for every exception that a method declares."""
    for module in model.modules():
        if isinstance(module, Delta | Shared):
            for name, parameter in module.named_parameters():
                group = module.groups.get(name) or module.groups.get(name.split(".")[0])
                if group is not None:
                    yield id(parameter), group
