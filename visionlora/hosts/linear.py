"""Linear layers, whole or in row slices, and the linear rule that attention shares.

`adapted_linear` picks the cheapest exact path for the active changes of one weight: the fused
factor path, the dense path where the formula says that forming the change is cheaper, a
transformation of the input, or a method's own `update`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.hosts.base import Host, Mode, Slot, rows_of
from visionlora.hosts.changes import (
    dense_change,
    dense_is_cheaper,
    padded,
    place_of,
    product,
    with_bias_changes,
)
from visionlora.hosts.lean import made_of
from visionlora.methods.base import Layer
from visionlora.ops import (
    Branch,
    Change,
    Rebuilt,
    changed_weight,
    dense_linear,
    lora_linear,
    with_gain,
)
from visionlora.sites import Kind


class LinearLayer:
    """The operators of a linear layer (see `visionlora.methods.base.Layer`)."""

    kind: Kind = "linear"
    channels: int = -1

    def __init__(self, weight: Tensor, training: bool) -> None:
        self.weight = weight
        self.training = training

    def down(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`x A^T`."""
        return F.linear(x, matrix)

    def up(self, h: Tensor, matrix: Tensor) -> Tensor:
        """`h B^T`."""
        return F.linear(h, matrix)

    def per_output(self, vector: Tensor) -> Tensor:
        """Outputs are the last dimension."""
        return vector

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Plain dropout."""
        return F.dropout(x, probability, self.training) if probability else x


class LinearHost(Host):
    """A Linear with adapters."""

    weight: Tensor
    bias: Any
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` plus the active changes."""
        if not self.slots:
            return F.linear(x, self.weight, self.bias)
        return adapted_linear(x, self.weight, self.bias, self.slots, self.training, self.state.mode)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: tuple[Slot, ...],
    training: bool,
    mode: Mode = "auto",
) -> Tensor:
    """Return `x W^T + b` plus the changes in `slots`, whose rows refer to `weight`."""
    if not slots:  # a projection of an attention that has adapters elsewhere
        return F.linear(x, weight, bias)
    bias = with_bias_changes(bias, slots)
    tokens = x.numel() // x.shape[-1]
    if mode == "auto" and _contracts(slots, weight, tokens, training):
        return dense_linear(x, weight, bias, [dense_change(slot) for slot in slots], made_of(x))
    if mode != "dense" and any(slot.delta.update is not None for slot in slots):
        return _with_updates(x, weight, bias, slots, training)
    if mode != "dense" and _rotates(slots):
        return _with_rotation(x, weight, bias, slots[0])
    changes: list[Change] = []
    # Branches with the same fold and dropout share one input, one product and one saved tensor.
    groups: dict[tuple[int, float], list[Branch]] = {}
    for slot in slots:
        factors = slot.delta.factors()
        drop = slot.delta.dropout if training else 0.0
        if factors is None:
            changes.append(dense_change(slot))
        elif factors[0].shape[1] == 0:  # rank 0: nothing to add
            continue
        elif mode == "dense" or (
            mode == "auto"
            and not drop
            and not slot.delta.gain_reaches_input
            and dense_is_cheaper(
                factors, rows_of(weight, slot.rows), tokens, frozen=slot.delta.frozen_factor
            )
        ):
            build = partial(product, fold=slot.delta.fold, gain=slot.delta.gains(factors))
            changes.append(Change(build, factors, *place_of(slot)))
        else:
            delta = slot.delta
            gain = delta.gains(factors), delta.gain_reaches_input
            branch = Branch(*factors, *place_of(slot), delta.frozen_factor, *gain)
            groups.setdefault((delta.fold, drop), []).append(branch)
    if not groups:
        if not changes:
            return F.linear(x, weight, bias)
        return dense_linear(x, weight, bias, changes, made_of(x))
    if changes:
        own = [change.tensors for change in changes]
        weight = changed_weight(weight, changes, own)
    (first, branches), *others = groups.items()
    z, rebuilt = _branch_input(x, *first), _rebuilt(x, *first)
    y = lora_linear(x, weight, bias, branches, z, rebuilt)
    for key, more in others:
        z = _branch_input(x, *key)
        for branch in more:
            part = _thin(x if z is None else z, branch, y.dtype)
            y = y + padded(branch.scale * part, branch.rows, y.shape[-1])
    return y


def _thin(z: Tensor, branch: Branch, dtype: torch.dtype) -> Tensor:
    """Return `z A^T B^T` in plain autograd."""

    def change(z: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.linear(z, down.to(dtype)), up.to(dtype))

    return with_gain(change, z, branch.up, branch.down, branch.gain, branch.gain_to_input)


def _contracts(slots: tuple[Slot, ...], weight: Tensor, tokens: int, training: bool) -> bool:
    """Whether to form the changed weight and to contract its gradient without forming that.

    Of T tokens this takes `2 r out in + T r (in + out)` multiply-adds, and the factor path
    `3 T r (in + out)`.
    """
    out_features, in_features = weight.shape
    return (
        tokens * (in_features + out_features) > out_features * in_features
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
        and all(
            slot.delta.contract is not None
            and slot.strength == 1.0
            and not (training and slot.delta.dropout)
            for slot in slots
        )
        and len({slot.rows for slot in slots}) == len(slots)
    )


def _rotates(slots: tuple[Slot, ...]) -> bool:
    """Whether one transformation of the input, at full strength, is all there is."""
    return (
        len(slots) == 1
        and slots[0].delta.rotate is not None
        and slots[0].rows is None
        and slots[0].strength == 1.0
    )


def _with_rotation(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Slot) -> Tensor:
    """Return `g * W R x + b`."""
    rotated, gain = slot.delta.rotate(x), slot.delta.gain()
    if gain is None:
        return F.linear(rotated, weight, bias)
    y = F.linear(rotated, weight)
    y = y * gain.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _branch_input(x: Tensor, fold: int, dropout: float) -> Tensor | None:
    """Return the input of a group of branches, or None where it is the layer's own input."""
    if fold == 1 and dropout == 0.0:
        return None
    z = _folded(x, fold)
    return F.dropout(z, dropout) if dropout else z


def _folded(x: Tensor, fold: int) -> Tensor:
    return x if fold == 1 else x.unflatten(-1, (fold, -1)).sum(-2)


def _rebuilt(x: Tensor, fold: int, dropout: float) -> Rebuilt | None:
    """Return what the input of a group of branches is made of, where that is kept anyway."""
    found = None if dropout else made_of(x)
    if found is None or fold == 1:
        return found
    return Rebuilt(found.origin, lambda origin: _folded(found.make(origin), fold))


def _with_updates(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: tuple[Slot, ...], training: bool
) -> Tensor:
    """Sum the changes of the output when some method rewrites it (such as DoRA)."""
    base = F.linear(x, weight)
    if len(slots) == 1 and slots[0].rows is None and slots[0].strength == 1.0:
        y = slots[0].delta.update(base, x, LinearLayer(weight, training))
    else:
        y = base
        for slot in slots:
            own = base if slot.rows is None else base[..., slot.rows[0] : slot.rows[1]]
            part = output_change(own, x, slot, LinearLayer(rows_of(weight, slot.rows), training))
            y = y + padded(part, slot.rows, weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


def output_change(base: Tensor, x: Tensor, slot: Slot, layer: Layer) -> Tensor:
    """Return what a slot adds to the layer's output without bias."""
    if slot.delta.update is not None:
        change = slot.delta.update(base, x, layer) - base
        return change if slot.strength == 1.0 else slot.strength * change
    factors = slot.delta.factors()
    if factors is None:
        return layer.down(x, (slot.strength * slot.delta.delta(layer.weight)).to(base.dtype))
    z = layer.dropout(x, slot.delta.dropout)

    def thin(z: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = layer.down(z, down.to(base.dtype).repeat(1, slot.delta.fold))
        return layer.up(hidden, up.to(base.dtype))

    gain = slot.delta.gains(factors)
    gain = None if gain is None else layer.per_output(gain)
    return slot.scale * with_gain(thin, z, *factors, gain, slot.delta.gain_reaches_input)
