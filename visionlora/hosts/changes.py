"""Changes of a weight as functions of tensors, and what a path through them costs.

Shared by all hosts: a dense change for `ops.dense_linear`, the changed weight for layers that go
through plain autograd, the changed bias, and the comparison of the factor path with the dense one.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.hosts.base import Slot, rows_of
from visionlora.methods.base import Delta
from visionlora.ops import Change, Frozen, multiply_adds, scale_gradient


def dense_change(slot: Slot) -> Change:
    """Return the change of a slot as a pure function of the tensors it is made of."""
    delta = slot.delta
    if torch.compiler.is_compiling():  # the compiler sees where the parameters come from
        return Change(delta.delta, (), slot.strength, slot.rows)
    modules = {"delta": delta, **{f"shared_{i}": item for i, item in enumerate(delta.shared)}}
    named = [
        (f"{prefix}.{name}", tensor)
        for prefix, module in modules.items()
        for name, tensor in module.named_parameters()
    ]
    names = [name for name, _ in named]
    tensors = tuple(tensor for _, tensor in named)
    build = partial(_delta_of, modules, names)
    return Change(
        build, tensors, slot.strength, slot.rows, delta.contract, delta.contract_uses_output
    )


def place_of(slot: Slot) -> tuple[float, tuple[int, int] | None]:
    """Return the scale and the rows of a slot."""
    return slot.scale, slot.rows


def _delta_of(
    modules: dict[str, nn.Module], names: list[str], weight: Tensor, *tensors: Tensor
) -> Tensor:
    """Evaluate the definition with other tensors in place of the parameters."""
    bound = _Bound(modules)
    values = dict(zip(names, tensors, strict=True))
    return cast(Tensor, torch.func.functional_call(bound, values, (weight,)))


class _Bound(nn.Module):
    """A Delta and what it shares, so that all their parameters can be swapped at once."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, weight: Tensor) -> Tensor:
        return cast(Delta, self.delta).delta(weight)


def product(
    weight: Tensor, up: Tensor, down: Tensor, *, fold: int, gain: Tensor | None = None
) -> Tensor:
    """The dense change of a factor pair, without its scale, and with the gain of its gradient.

    A method that multiplies matrices to make one factor returns it in the type of autocast.
    """
    dtype = torch.promote_types(up.dtype, down.dtype)
    change = up.to(dtype) @ (down if fold == 1 else down.repeat(1, fold)).to(dtype)
    return change if gain is None else scale_gradient(change, gain[:, None])


def with_bias_changes(bias: Tensor | None, slots: tuple[Slot, ...]) -> Tensor | None:
    """Return the bias plus the changes of the slots, whose rows refer to it."""
    for slot in slots:
        change = slot.delta.bias_change()
        if change is not None and bias is not None:
            change = (slot.strength * change).to(bias.dtype)
            bias = bias + padded(change, slot.rows, bias.shape[0])
    return bias


def dense_is_cheaper(
    factors: tuple[Tensor, Tensor],
    weight: Tensor,
    tokens: int,
    groups: int = 1,
    frozen: Frozen = "",
) -> bool:
    """Compare multiply-adds of one training step of the two exact paths.

    Factors: see `visionlora.ops.lora.multiply_adds`; a thin convolution repeats the input for each
    group. Dense: `3 r out in` to build the change twice and for its gradient, and `T out in` for
    the gradient of the weight.
    """
    out_features, in_features = weight.shape[0], weight[0].numel()
    rank = factors[0].shape[1]
    thin = multiply_adds(tokens, rank, out_features, groups * in_features, frozen)
    return thin > 3 * rank * out_features * in_features + tokens * out_features * in_features


def with_changes(weight: Tensor, slots: list[Slot]) -> Tensor:
    """Return the weight `(out, in)` with the dense changes of the slots added to their rows."""
    result = weight
    for slot in slots:
        change = slot.strength * slot.delta.delta(rows_of(weight, slot.rows))
        change = change.to(weight.dtype)
        result = result + padded(change.t(), slot.rows, weight.shape[0]).t()
    return result


def padded(part: Tensor, rows: tuple[int, int] | None, total: int) -> Tensor:
    """Place columns `rows` of a last dimension of size `total`, zero elsewhere."""
    return part if rows is None else F.pad(part, (rows[0], total - rows[1]))
