"""Linear layers, whole or in row slices, and the linear rule that attention shares.

`adapted_linear` picks the cheapest exact path for the active changes of one weight: the fused
factor path, the dense path where the formula says that forming the change is cheaper, or a method's
own `update`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from visionlora.hosts.base import Host, Mode, Slot, rows_of
from visionlora.methods.base import Layer
from visionlora.ops import Branch, lora_linear


class LinearLayer:
    """The operators of a linear layer (see `visionlora.methods.base.Layer`)."""

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
    dense, factored, updating = [], [], []
    tokens = x.numel() // x.shape[-1]
    for slot in slots:
        if slot.delta.update is not None and mode != "dense":
            updating.append(slot)
            continue
        factors = None if mode == "dense" else slot.delta.factors()
        drops = training and slot.delta.dropout > 0
        if factors is None or (
            mode == "auto"
            and not drops
            and dense_is_cheaper(factors, rows_of(weight, slot.rows), tokens)
        ):
            dense.append(slot)
        else:
            factored.append((slot, Branch(*factors, slot.scale, slot.rows)))
    if updating:
        return _with_updates(x, weight, bias, slots, training)
    effective = weight if not dense else with_changes(weight, dense)
    if not factored:
        return F.linear(x, effective, bias)
    # Branches with the same fold and dropout share one input, one product and one saved tensor.
    groups: dict[tuple[int, float], list[Branch]] = {}
    for slot, branch in factored:
        groups.setdefault((slot.delta.fold, slot.delta.dropout if training else 0.0), []).append(
            branch
        )
    (first, branches), *others = groups.items()
    y = lora_linear(x, effective, bias, branches, _branch_input(x, *first))
    for key, more in others:
        z = _branch_input(x, *key)
        for branch in more:
            h = F.linear(x if z is None else z, branch.down.to(y.dtype))
            y = y + padded(
                branch.scale * F.linear(h, branch.up.to(y.dtype)), branch.rows, y.shape[-1]
            )
    return y


def dense_is_cheaper(
    factors: tuple[Tensor, Tensor], weight: Tensor, tokens: int, groups: int = 1
) -> bool:
    """Compare multiply-adds of one training step of the two exact paths.

    Factors: `3 T r (g in + out)`. Dense: `3 r out in` to build the change and its gradient, and one
    weight-gradient product `T out in`.
    """
    out_features, in_features = weight.shape[0], weight[0].numel()
    rank = factors[0].shape[1]
    thin = 3 * tokens * rank * (groups * in_features + out_features)
    return thin > 3 * rank * out_features * in_features + tokens * out_features * in_features


def with_changes(weight: Tensor, slots: list[Slot]) -> Tensor:
    """Return the weight `(out, in)` with the dense changes of the slots added to their rows."""
    result = weight
    for slot in slots:
        change = (slot.strength * slot.delta.delta(rows_of(weight, slot.rows))).to(weight.dtype)
        result = result + padded(change.t(), slot.rows, weight.shape[0]).t()
    return result


def padded(part: Tensor, rows: tuple[int, int] | None, total: int) -> Tensor:
    """Place columns `rows` of a last dimension of size `total`, zero elsewhere."""
    return part if rows is None else F.pad(part, (rows[0], total - rows[1]))


def _branch_input(x: Tensor, fold: int, dropout: float) -> Tensor | None:
    """Return the input of a group of branches, or None where it is the layer's own input."""
    if fold == 1 and dropout == 0.0:
        return None
    z = x if fold == 1 else x.unflatten(-1, (fold, -1)).sum(-2)
    return F.dropout(z, dropout) if dropout else z


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
    up, down = (factor.to(base.dtype) for factor in factors)
    hidden = layer.down(layer.dropout(x, slot.delta.dropout), down.repeat(1, slot.delta.fold))
    return slot.scale * layer.up(hidden, up)
