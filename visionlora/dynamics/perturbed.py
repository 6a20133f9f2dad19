"""Training at a displaced point: move tensors, look, put them back bit for bit.

`Displaced` keeps copies of tensors that are about to be moved and puts them back from those copies,
never by subtraction, which would leave rounding errors behind. `SecondLook` is the dynamics of all
methods with two passes per step: with phi all trained tensors of the adapters and nothing else,

    g0 = grad L(phi),   phi' = phi + (rho / (|g0| + 1e-12) - a) g0,   g1 = grad L(phi')
    g = combine(g0, g1)

where |g0| is one norm over all of phi, of the gradient of the whole step: averaged over processes,
summed over micro-batches, unscaled. The second pass repeats the micro-batches with the random draws
of the first, and phi is back in place before the gradients are combined. A trained tensor that
belongs to no adapter, such as a head, is not moved and keeps its gradient of the first pass
(derived: methods of this family say nothing about it).

Cost: two forwards and backwards a step, and copies of phi and g0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.errors import ConfigError
from visionlora.record import adapter_parameter_owners

Combine = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
"""Makes the gradients of the step from those of both passes."""


class Displaced:
    """Tensors away from home: keeps their values, and memory for them from step to step."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Note the values of tensors that are about to be moved in place, and return the copies."""
        self.restore()
        found = [item.detach() for item in tensors]
        if [_layout(item) for item in found] != [_layout(item) for item in self._kept]:
            self._kept = [torch.empty_like(item) for item in found]
        if found:
            torch._foreach_copy_(self._kept, found)
        self._tensors = found
        return self._kept

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back; does nothing if they are back already."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._kept)
            self._tensors = []


class SecondLook(Dynamics):
    """Combines the gradient with that at a point uphill; see the module docstring.

    Args:
        name: key of the dynamics in a run.
        model: the model, outside of any data-parallel wrapper.
        optimizer: holds what is trained.
        radius: returns rho of a step, or None for a step with one pass.
        combine: makes the gradients of the step from those of both passes.
        offset: a in the equation.

    Raises:
        ConfigError: the optimiser holds no tensor of an adapter.
    """

    wants_second_pass = True

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        radius: Callable[[int], float | None],
        combine: Combine,
        offset: float = 0.0,
    ) -> None:
        self.name = name
        self.model = model
        self.radius, self.combine, self.offset = radius, combine, offset
        self._displaced = Displaced()
        need_adapters(name, model, optimizer)

    def second_pass(self, context: StepContext) -> None:
        """Look at the loss uphill and combine both gradients."""
        radius = self.radius(context.step)
        if radius is None:
            return
        clean = [(parameter, parameter.grad) for parameter in context.parameters]
        owners = adapter_parameter_owners(self.model)
        pairs = [(p, grad) for p, grad in clean if grad is not None and id(p) in owners]
        if not pairs:  # all adapters are frozen in this step
            return
        moved, first = [p for p, _ in pairs], [grad for _, grad in pairs]
        by = radius / (global_norm(first) + 1e-12) - self.offset
        self._displaced.keep(moved)
        try:
            move(moved, first, by)
            context.backward_again()
        finally:
            self._displaced.restore()
        second = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        for parameter, grad in clean:
            parameter.grad = grad
        for parameter, grad in zip(moved, self.combine(first, second), strict=True):
            parameter.grad = grad


def need_adapters(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a run that trains no tensor of an adapter."""
    owners = adapter_parameter_owners(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in owners for p in held):
        raise ConfigError(
            f"{name} moves the tensors of adapters, but the optimizer holds none; inject an "
            "adapter and build the optimizer from the model after that"
        )


@torch.no_grad()
def move(tensors: Sequence[Tensor], along: Sequence[Tensor], by: float) -> None:
    """Add `by * along` to tensors in place."""
    torch._foreach_add_([item.detach() for item in tensors], list(along), alpha=by)


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm of all tensors together, in at least float32."""
    if not tensors:
        return 0.0
    norms = torch._foreach_norm(list(tensors))
    return float(torch.linalg.vector_norm(torch.stack([_wide(norm) for norm in norms])))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
