r"""A linear layer whose whole weight changes, without keeping the changed weight.

    y = x (W + sum_i s_i D_i)^T + b,   D_i = build_i(W, theta_i)

Written as plain autograd this keeps every intermediate of the build and the changed weight itself.
Here `x` (or what it can be made of again), the parameters and a reference to W are kept; the
backward evaluates the build once more and takes its vector-Jacobian product in weight space:

    dx = g W',   dW' = g^T x,   d theta_i = (d D_i / d theta_i)^T s_i dW'

so a step costs full fine-tuning plus two builds and one derivative of the build, for any method. A
method whose parameters need less than all of `dW'` brings its own `contract`, and `dW'` is not
formed. If that uses the output, the output is kept, which most often its reader keeps anyway; where
the reader overwrites it in place (a ReLU may), `contract` does without.

The backward is differentiable, for second-order methods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visionlora.ops.rebuilt import Rebuilt


class Change(NamedTuple):
    """One dense change: how it is built, from what, its scale, and the rows it adds to."""

    build: Callable[..., Tensor]
    """`build(weight, *tensors)` returns `(rows, in)`; a pure function."""
    tensors: tuple[Tensor, ...]
    scale: float
    rows: tuple[int, int] | None = None
    contract: Callable[..., tuple[Tensor, ...]] | None = None
    """`contract(weight, x, g, dots, *tensors)` returns the gradient of each tensor."""
    uses_output: bool = False
    """Whether `dots` is wanted: `sum_t g * (y - b)` per output feature (None if it is lost)."""


class _Kept:
    """The output on its way from one node of the graph to the next, during one backward."""

    output: Tensor | None = None


def dense_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    changes: list[Change],
    rebuilt: Rebuilt | None = None,
) -> Float[Tensor, "*batch out"]:
    """Return `x (W + changes)^T + b`.

    Args:
        x: input, `(*batch, in)`.
        weight: frozen weight, `(out, in)`.
        bias: `(out,)` or None.
        changes: what is added to which rows of the weight.
        rebuilt: what `x` is made of, to be kept in its place.

    Returns:
        `(*batch, out)` in the compute type of `x` (the autocast type where autocast is on).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():  # the compiler plans its own recomputation
            changed = changed_weight(weight, changes, [item.tensors for item in changes])
            return F.linear(x, changed.to(x.dtype), None if bias is None else bias.to(x.dtype))
        tensors = [tensor for change in changes for tensor in change.tensors]
        kept = _Kept()
        x2, made_of = x.reshape(-1, x.shape[-1]), rebuilt or (None, None)
        y = _DenseLinear.apply(x2, weight, bias, *made_of, changes, kept, *tensors)
        if y.requires_grad and any(change.uses_output for change in changes):
            y = _KeepOutput.apply(y, kept)
        return y.view(*x.shape[:-1], weight.shape[0])


def changed_weight(
    weight: Tensor, changes: list[Change], tensors: list[tuple[Tensor, ...]]
) -> Tensor:
    """Return W plus all changes, built from `tensors`."""
    result = weight
    for change, own in zip(changes, tensors, strict=True):
        if change.rows is None:
            part = change.build(weight, *own)
            result = result + (part if change.scale == 1.0 else change.scale * part).to(
                result.dtype
            )
            continue
        start, stop = change.rows
        part = change.scale * change.build(weight[start:stop], *own)
        changed = result[start:stop] + part.to(result.dtype)
        result = torch.slice_scatter(result, changed, 0, start, stop)
    return result


class _DenseLinear(torch.autograd.Function):
    """See the module docstring; x is 2-D here."""

    @staticmethod
    def forward(ctx, x, weight, bias, origin, make, changes, kept, *tensors):  # type: ignore[no-untyped-def]
        changed = changed_weight(weight, changes, _split(changes, tensors))
        # needs_input_grad: x, weight, bias, origin, make, changes, kept, tensors ...
        trains = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[7:])
        ctx.changes, ctx.kept, ctx.make, ctx.dtype = changes, kept, make, x.dtype
        source = x if make is None else origin
        ctx.save_for_backward(source if trains else None, weight, bias, *tensors)
        return F.linear(x, changed.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight, bias, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if x is not None and ctx.make is not None:
            x = ctx.make(x).to(ctx.dtype)
            x = x.reshape(-1, x.shape[-1])
        output, ctx.kept.output = ctx.kept.output, None
        again = torch.is_grad_enabled()  # a second derivative is wanted
        sources = [weight, *tensors]
        if not again:
            wanted = (needs[1], *needs[7:])
            sources = [
                item.detach().requires_grad_(need)
                for item, need in zip(sources, wanted, strict=True)
            ]
        own = _split(ctx.changes, sources[1:])
        contracts = all(item.contract is not None for item in ctx.changes) and not needs[1]
        with torch.autocast(g.device.type, enabled=False):
            with torch.set_grad_enabled(again or (x is not None and not contracts)):
                changed = changed_weight(sources[0], ctx.changes, own)
            grad_x = g @ (changed if again else changed.detach()).to(g.dtype) if needs[0] else None
            grads: list[Any] = [None] * len(sources)
            if x is not None and contracts:
                grads[1:] = _contracted(ctx.changes, weight, bias, x, g, output, own)
            elif x is not None:
                inputs = [index for index, item in enumerate(sources) if item.requires_grad]
                found = torch.autograd.grad(
                    changed,
                    [sources[index] for index in inputs],
                    (g.t() @ x).to(changed.dtype),
                    create_graph=again,
                    allow_unused=True,
                )
                for index, gradient in zip(inputs, found, strict=True):
                    grads[index] = gradient
            grad_bias = g.sum(0) if needs[2] else None
        return grad_x, grads[0], grad_bias, None, None, None, None, *grads[1:]


class _KeepOutput(torch.autograd.Function):
    """Hand the output to the backward of `_DenseLinear`, unless it was overwritten meanwhile."""

    @staticmethod
    def forward(ctx, y, kept):  # type: ignore[no-untyped-def]
        ctx.kept = kept
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        try:
            (ctx.kept.output,) = ctx.saved_tensors
        except RuntimeError:  # torch's refusal of a saved tensor that was changed in place
            ctx.kept.output = None
        return g, None


def _contracted(
    changes: list[Change],
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    g: Tensor,
    output: Tensor | None,
    tensors: list[tuple[Tensor, ...]],
) -> list[Tensor]:
    """Return the gradients of all tensors without forming that of the weight."""
    dots = None
    if output is not None:
        dots = (g * output).sum(0)
        dots = dots if bias is None else dots - bias.to(g.dtype) * g.sum(0)
    gradients: list[Tensor] = []
    for change, own in zip(changes, tensors, strict=True):
        assert change.contract is not None
        rows = slice(*change.rows) if change.rows else slice(None)
        part = None if dots is None else dots[rows]
        gradients.extend(change.contract(weight[rows], x, g[:, rows], part, *own))
    return gradients


def _split(changes: list[Change], tensors: Any) -> list[tuple[Tensor, ...]]:
    """Hand every change its own tensors."""
    result, start = [], 0
    for change in changes:
        stop = start + len(change.tensors)
        result.append(tuple(tensors[start:stop]))
        start = stop
    return result
