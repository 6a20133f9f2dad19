"""A Controller is the training-time policy of one adapter: it masks, grows, shrinks or penalises.

It is a dynamics, so it sees the events of every step and its state is part of every checkpoint. It
keeps no Delta and no parameter between steps, because a resumed run has others; it keeps the places
where they are. Whatever it decides must follow from what all processes agree on: the parameters,
the averaged gradients, and what went through `context.mean`.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.methods.base import Delta, Shared
from visionlora.ranks.structure import Place, places_of
from visionlora.registry import get_method


class Controller(Dynamics):
    """Base of all controllers.

    Args:
        model: the model, outside of any data-parallel wrapper.
        adapter: the adapter that is controlled.
        method: the registered method whose sites of that adapter are controlled.
        optimizer: the optimiser of the run, which the controller may regroup.
        steps: length of the run.
    """

    controls = True
    reshapes: ClassVar[bool] = False
    """Replaces, adds or takes out parameters while it trains."""

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        method: str,
        optimizer: torch.optim.Optimizer,
        steps: int,
    ) -> None:
        self.name = f"{method}:{adapter}"
        self.model = model
        self.optimizer = optimizer
        self.steps = steps
        self.adapter, self.method = adapter, method
        self.places: list[Place] = self.find()
        self.begin()

    def begin(self) -> None:
        """Set what a run starts with, once all of the above is known."""

    def find(self) -> list[Place]:
        """Return the places that are controlled, as they are now, in module order."""
        return [
            place
            for place in places_of(self.model, self.adapter)
            if place.delta.config.method == self.method and place.active
        ]

    def held_out(self, step: int) -> bool:
        """Return whether a step is on the data that are held out from the others."""
        return False


class Penalties(Controller):
    """Adds the penalties that Deltas and Shared modules declare."""

    def begin(self) -> None:
        """Take a name of its own beside the controller of the same method."""
        self.name = f"penalties:{self.name}"

    def penalty(self, context: StepContext) -> Tensor | None:
        """Return the sum of all penalties, or None if there is none."""
        deltas = [place.delta for place in self.places]
        shared = dict.fromkeys(part for delta in deltas for part in delta.shared)
        return total([*(item.penalty() for item in deltas), *(item.penalty() for item in shared)])


def controllers_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> list[Controller]:
    """Return the controllers that the active, trained adapters of a model need for a run.

    Args:
        model: the model, outside of any data-parallel wrapper, on its device.
        optimizer: the optimiser of the run; a controller may give some parameters their own group.
        steps: length of the run.
    """
    pairs = dict.fromkeys(
        (place.adapter, place.delta.config.method)
        for place in places_of(model)
        if place.active and _trained(place.delta)
    )
    found: list[Controller] = []
    for adapter, name in pairs:
        method = get_method(name)
        if method.controller is not None:
            found.append(method.controller(model, adapter, name, optimizer, steps))
        declared: list[type[Delta] | type[Shared] | None] = [method.delta, method.shared]
        if any(kind is not None and not _silent(kind) for kind in declared):
            found.append(Penalties(model, adapter, name, optimizer, steps))
    return found


def total(terms: Iterable[Tensor | None]) -> Tensor | None:
    """Return the sum of what is there, or None."""
    result: Tensor | None = None
    for term in terms:
        if term is not None:
            result = term if result is None else result + term
    return result


def _silent(kind: type[Delta] | type[Shared]) -> bool:
    return kind.penalty in (Delta.penalty, Shared.penalty)


def _trained(delta: Delta) -> bool:
    modules: tuple[nn.Module, ...] = (delta, *delta.shared)
    return any(item.requires_grad for module in modules for item in module.parameters())
