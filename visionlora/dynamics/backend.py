"""What a training step needs from the machinery around it, and the simplest such machinery."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Backend(Protocol):
    """What a step needs from the machinery around it."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a backward does not average gradients over processes."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context for one forward."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of one loss, scaled if the precision needs it."""

    def loss_scale(self) -> float:
        """Return what `unscale` divides the gradients by."""

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the optimiser."""

    def skip(self) -> None:
        """Note that a step was given up; a loss scale is lowered."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all processes."""


class PlainBackend:
    """One process, full precision."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return an empty context."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an empty context."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of the loss."""
        torch.autograd.backward(loss)

    def loss_scale(self) -> float:
        """Return 1: losses are not scaled."""
        return 1.0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the gradients as they are."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Run `optimizer.step()`."""
        optimizer.step()

    def skip(self) -> None:
        """Do nothing: there is no loss scale."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the value itself."""
        return value
