r"""Which weights a change of behaviour is due to: filter attribution integrated gradients (FAIG).

    theta(a) = a theta0 + (1 - a) theta1,      a = (t + 1/2) / N  or  t / N,   t = 0 .. N - 1
    g_p      = (1/N) sum_t dL(theta(a_t)) / dtheta_p
    FAIG_p   = mean over batches of | g_p (theta0_p - theta1_p) |

for every scalar weight p between two sets of weights of one model. Without the absolute value the
sum over all weights tends to L(theta0) - L(theta1) as N grows. `left` points hold the theta1 end
and not the theta0 end, as the authors' code with N = 100 does; midpoints are more exact with fewer
(derived). Two cheaper scores: |dL/dtheta_p| |theta0_p| needs no second model, and |theta0 - theta1|
no data.

Xie et al. 2021, "Finding Discriminative Filters for Specific Degradations in Blind
Super-Resolution", arXiv 2108.01070. Memory: about four times the weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError

Rule = Literal["midpoint", "left"]
Weights = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
"""Loss of a model on a batch. The authors sum squared errors over the pixels of one image."""


def attribute(
    model: nn.Module,
    start: Weights,
    end: Weights,
    batches: Iterable[Any],
    loss: Loss,
    *,
    points: int = 16,
    rule: Rule = "midpoint",
) -> dict[str, Tensor]:
    """Return FAIG of every parameter that is in both sets of weights.

    Args:
        model: runs with any weights between the two; it has its own again afterwards.
        start: theta0, by the model's parameter names.
        end: theta1.
        batches: what the loss is taken on; absolute values are taken batch by batch.
        loss: a scalar, not averaged in any way that the batch does not ask for.
        points: N.
        rule: where on the path gradients are taken.

    Raises:
        ConfigError: no batch, no common parameter, or shapes that differ.
    """
    differences = _differences(model, start, end)
    scores = {name: torch.zeros_like(value) for name, value in differences.items()}
    count = 0
    for batch in batches:
        mean = path_gradients(model, start, end, batch, loss, points=points, rule=rule)
        for name, score in scores.items():
            score += (mean[name] * differences[name]).abs_()
        count += 1
    if not count:
        raise ConfigError("attribution needs at least one batch")
    return {name: score / count for name, score in scores.items()}


def path_gradients(
    model: nn.Module,
    start: Weights,
    end: Weights,
    batch: Any,
    loss: Loss,
    *,
    points: int = 16,
    rule: Rule = "midpoint",
) -> dict[str, Tensor]:
    """Return the mean gradient of the loss of one batch along the straight path."""
    if points < 1:
        raise ConfigError(f"a path needs at least one point, got {points}")
    names = list(_differences(model, start, end))
    parameters = dict(model.named_parameters())
    shift = 0.5 if rule == "midpoint" else 0.0
    with _borrowed(model, names) as own:
        first, last = (_apart(parameters, own, weights) for weights in (start, end))
        for step in range(points):
            share = (step + shift) / points
            with torch.no_grad():
                for name in names:
                    torch.lerp(last[name], first[name], share, out=parameters[name].data)
            loss(model, batch).backward()
        found = {name: _gradient(parameters[name]).div_(points) for name in names}
    return found


def sensitivity(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Return the mean over batches of |dL/dtheta_p| |theta_p|, of every parameter.

    Raises:
        ConfigError: no batch.
    """
    parameters = dict(model.named_parameters())
    scores = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = 0
    for batch in batches:
        with _borrowed(model, list(parameters)):
            loss(model, batch).backward()
            for name, score in scores.items():
                score += _gradient(parameters[name]).abs() * parameters[name].detach().abs()
        count += 1
    if not count:
        raise ConfigError("attribution needs at least one batch")
    return {name: score / count for name, score in scores.items()}


def magnitude(start: Weights, end: Weights) -> dict[str, Tensor]:
    """Return |theta0 - theta1| of every parameter in both."""
    return {name: (start[name] - end[name]).abs() for name in start if name in end}


def _differences(model: nn.Module, start: Weights, end: Weights) -> dict[str, Tensor]:
    """Return theta0 - theta1 of the parameters of the model that both have."""
    found = {}
    for name, parameter in model.named_parameters():
        if name not in start or name not in end:
            continue
        if not start[name].shape == end[name].shape == parameter.shape:
            raise ConfigError(
                f"{name} is {tuple(parameter.shape)} in the model, {tuple(start[name].shape)} and "
                f"{tuple(end[name].shape)} in the weights"
            )
        found[name] = (start[name] - end[name]).detach()
    if not found:
        raise ConfigError("the two sets of weights have no parameter of the model in common")
    return found


@contextmanager
def _borrowed(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Let parameters collect gradients, and put values, flags and gradients back after.

    Yields copies of the values.
    """
    parameters = dict(model.named_parameters())
    own = {name: p.detach().clone() for name, p in parameters.items()}
    kept = [(p, own[name], p.requires_grad, p.grad) for name, p in parameters.items()]
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        yield own
    finally:
        with torch.no_grad():
            for parameter, value, flag, gradient in kept:
                parameter.data.copy_(value)
                parameter.requires_grad_(flag)
                parameter.grad = gradient


def _apart(
    parameters: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: Weights
) -> dict[str, Tensor]:
    """Return weights of which none is a parameter itself, as the state dict of the model has."""
    return {
        name: own[name] if weights[name].data_ptr() == parameter.data_ptr() else weights[name]
        for name, parameter in parameters.items()
        if name in weights
    }


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
