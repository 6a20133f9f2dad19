"""Looking at a model with batches of data without leaving a trace in it."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, DataError
from visionlora.record import hosts_of

Samples = Callable[[Any], float]


@contextmanager
def undisturbed(model: nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Run the base model for its gradients: no adapter, no dropout, no running statistics.

    Inside, the whole model is in eval mode, no adapter applies, and only `wanted` requires
    gradients. Modes, flags, gradients, adapters and the states of the global random generators are
    afterwards as they were, whatever happens.
    """
    wanted_ids = {id(item) for item in wanted}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hosts = [(host, host.state.enabled) for host in hosts_of(model).values()]
    devices = {p.device for p, _, _ in parameters if p.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted_ids)
            model.eval()
            for host, _ in hosts:
                host.state.enabled = False
                host.refresh()
            yield
        finally:
            for host, enabled in hosts:
                host.state.enabled = enabled
                host.refresh()
            for module, training in modes:
                module.training = training
            for parameter, flag, gradient in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def counted(
    batches: Iterable[Any], count: int | None, samples: Samples | None = None
) -> Iterator[tuple[Any, float]]:
    """Yield each batch with the number of its samples, and read no batch too many.

    Args:
        batches: any iterable.
        count: how many to yield, None for all.
        samples: returns the number of samples of a batch; by default the length of the first
            tensor in it.

    Raises:
        DataError: there is no batch, there are fewer than `count`, or one is empty.
        ConfigError: the number of samples of a batch is not known.
    """
    came = 0
    for batch in islice(batches, count):
        size = _length(batch) if samples is None else float(samples(batch))
        if size is None:
            raise ConfigError(
                f"a {type(batch).__name__} as a batch holds no tensor whose length would be its "
                "number of samples; pass samples=, a function of a batch"
            )
        if not (math.isfinite(size) and size > 0):
            raise DataError(f"estimation batch {came} has {size:g} samples")
        yield batch, size
        came += 1
    if came < (count or 1):
        wanted = "at least one batch is" if count is None else f"count={count} batches are"
        raise DataError(f"{wanted} needed to estimate the statistics, but only {came} came")


def mean_loss(loss_fn: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch.

    Raises:
        ConfigError: it is no scalar tensor.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"the loss function must return one scalar tensor, got {got}")
    return loss


def _length(batch: Any) -> float | None:
    """Return the length of the first tensor in a batch, None if there is none."""
    if isinstance(batch, Tensor):
        return float(len(batch)) if batch.dim() else None
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, list | tuple):
        parts = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return next((size for part in parts if (size := _length(part)) is not None), None)
