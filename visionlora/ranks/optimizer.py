"""Changing the parameters of a running optimiser: replace, drop, regroup, warm up again.

Every function keeps the optimiser consistent: a parameter is in exactly one group, no state is left
of one that is gone, and a new group has the options of the one it comes from. `fit` sets the
learning rates of all groups with `set_rates`, so a group that starts later has its own warm-up.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError

Group = dict[str, Any]

_START, _WARMUP = "warmup_start", "warmup_steps"


def replace(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    carry: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Put `new` in the place of `old`, in the same group.

    Args:
        optimizer: holds `old`.
        old: the parameter that goes.
        new: the parameter that comes, of any shape.
        carry: makes the state of `new` from that of `old`: applied to every state tensor of the
            shape of `old` (crop it, or pad it), while counters are kept. Without it the state of
            `new` starts afresh.

    Raises:
        ConfigError: the optimiser does not hold `old`.
    """
    group = group_of(optimizer, old)
    group["params"] = [new if item is old else item for item in group["params"]]
    state = optimizer.state.pop(old, None)
    if carry is not None and state:
        optimizer.state[new] = {
            key: carry(value) if _like(value, old) else value for key, value in state.items()
        }


def drop(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget parameters with their state, and groups that are empty then."""
    gone = {id(item) for item in parameters}
    for group in optimizer.param_groups:
        for item in group["params"]:
            if id(item) in gone:
                optimizer.state.pop(item, None)
        group["params"] = [item for item in group["params"] if id(item) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def add(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    like: nn.Parameter,
    **options: Any,
) -> Group:
    """Append a group of new parameters with the options of the group of `like`, and return it.

    The new group knows no warm-up of that group; `warm_up` gives it one.

    Args:
        optimizer: holds `like`.
        parameters: tensors that the optimiser does not hold yet.
        like: the parameter whose group is copied.
        **options: options that differ, such as `weight_decay`; an `lr` is the rate at multiplier 1.
    """
    left_out = ("params", _START, _WARMUP)
    copied = {k: v for k, v in group_of(optimizer, like).items() if k not in left_out}
    if "lr" in options:
        options["initial_lr"] = options["lr"]
    optimizer.add_param_group({**copied, **options, "params": list(parameters)})
    return optimizer.param_groups[-1]


def move(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], **options: Any
) -> list[Group]:
    """Give parameters groups of their own, one for each group they come from; their state stays.

    Args:
        optimizer: holds the parameters.
        parameters: tensors that are to share no group with others.
        **options: options that differ, such as `weight_decay`; an `lr` is the rate at multiplier 1.
    """
    moved = list(parameters)
    ids = {id(item) for item in moved}
    for item in moved:
        group_of(optimizer, item)
    if "lr" in options:
        options["initial_lr"] = options["lr"]
    kept, made = [], []
    for group in optimizer.param_groups:
        own = [item for item in group["params"] if id(item) in ids]
        rest = [item for item in group["params"] if id(item) not in ids]
        if own:
            made.append({**group, **options, "params": own})
        if rest:
            kept.append({**group, "params": rest})
    optimizer.param_groups[:] = kept + made
    return made


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Group:
    """Return the group that holds a parameter.

    Raises:
        ConfigError: there is none.
    """
    for group in optimizer.param_groups:
        if any(item is parameter for item in group["params"]):
            return group
    shape = tuple(parameter.shape)
    raise ConfigError(f"the optimizer does not hold the parameter of shape {shape} to be changed")


def warm_up(group: Group, start: int, steps: int) -> None:
    """Let the rate of a group rise again from 0 at step `start` over `steps` steps."""
    group[_START], group[_WARMUP] = start, steps


def set_rates(optimizer: torch.optim.Optimizer, step: int, multiplier: float) -> None:
    """Set the learning rate of every group for a step.

    That is its initial rate, times the schedule's multiplier, times its own warm-up if it has one.
    """
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * multiplier * _rise(group, step)


def _rise(group: Group, step: int) -> float:
    steps = group.get(_WARMUP, 0)
    return min(1.0, max(0.0, (step - group[_START]) / steps)) if steps else 1.0


def _like(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
