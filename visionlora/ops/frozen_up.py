r"""Branches of large rank whose up-matrix is frozen, through the changed weight.

    y = x W'^T + b,   W' = W + s B A,   B frozen

The forward is one product with W'. In the backward, with `g = dL/dy`, two things are chosen by
cost. `dx = g W'` needs W' again: it is kept, in place of A, where that takes no more memory than
the input does; else `dx = g W + (s g B) A`. And dA is taken in the cheaper order:

    dA = s B^T (g^T x)     or     dA = (s g B)^T x

The backward is differentiable: W', where it is kept, is a second output of the function.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.ops.rebuilt import Rebuilt

Layout = tuple[tuple[float, tuple[int, int] | None], ...]
"""Scale and rows of every branch."""


def frozen_up_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    factors: Sequence[Tensor],
    rebuilt: Rebuilt | None = None,
) -> Tensor:
    """Return the layer's output for 2-D `x`; `factors` alternates up and down.

    What `x` is made of, if that is known, is kept in its place.
    """
    rank = sum(up.shape[1] for up in factors[0::2])
    keeps = _keeps(x.shape[0], rank, weight.shape[0])
    y, _ = _FrozenUp.apply(x, weight, bias, *(rebuilt or (None, None)), layout, keeps, *factors)
    return y


def backward_multiply_adds(tokens: int, rank: int, out_features: int, in_features: int) -> int:
    """Return the multiply-adds of the backward beside those of the base layer."""
    thin = tokens * rank * (out_features + in_features)
    if not _keeps(tokens, rank, out_features):
        return thin + tokens * rank * in_features
    return min(thin, tokens * out_features * in_features + rank * out_features * in_features)


def _keeps(tokens: int, rank: int, out_features: int) -> bool:
    """Whether W' in place of A takes no more memory than the input: (out - r) in <= T in."""
    return out_features - rank <= tokens


def changed(
    weight: Tensor, layout: Layout, ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> Tensor:
    """Return W plus the change of every branch."""
    result = weight
    for (scale, rows), up, down in zip(layout, ups, downs, strict=True):
        start, stop = rows or (0, weight.shape[0])
        part = torch.addmm(
            result[start:stop], up.to(weight.dtype), down.to(weight.dtype), alpha=scale
        )
        whole = stop - start == weight.shape[0]
        result = part if whole else torch.slice_scatter(result, part, 0, start, stop)
    return result


_DOWN = 8  # place of `down_0` among the arguments


class _FrozenUp(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(ctx, x, weight, bias, origin, make, layout, keeps, *factors):  # type: ignore[no-untyped-def]
        ups, downs = factors[0::2], factors[1::2]
        whole = changed(weight.to(x.dtype), layout, ups, downs)
        y = F.linear(x, whole, None if bias is None else bias.to(x.dtype))
        kept = whole if keeps else x.new_empty(0)
        # needs_input_grad: x, weight, bias, origin, make, layout, keeps, up_0, down_0, up_1, ...
        trains = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[_DOWN::2])
        ctx.layout, ctx.keeps, ctx.make, ctx.dtype = layout, keeps, make, x.dtype
        source = x if make is None else origin
        ctx.types = [down.dtype for down in downs]
        ctx.save_for_backward(
            source if trains else None, weight, kept, *ups, *(() if keeps else downs)
        )
        ctx.set_materialize_grads(False)
        return y, kept

    @staticmethod
    def backward(ctx, g, g_kept):  # type: ignore[no-untyped-def]
        x, weight, kept, *rest = ctx.saved_tensors
        needs, layout = ctx.needs_input_grad, ctx.layout
        ups, downs = rest[: len(layout)], rest[len(layout) :]
        if g is None and g_kept is None:
            return (None,) * len(needs)
        if x is not None and ctx.make is not None:
            x = ctx.make(x).to(ctx.dtype)
            x = x.reshape(-1, x.shape[-1])
        if g is None:
            g = g_kept.new_zeros(x.shape[0], weight.shape[0])  # only W' was used
        parts = [g if rows is None else g[:, rows[0] : rows[1]] for _, rows in layout]
        dense = needs[1] or g_kept is not None or _dense_order(x, weight, ups)
        hidden: list[Tensor] = []
        if not (ctx.keeps and dense):
            hidden = [
                scale * (part @ up.to(g.dtype))
                for (scale, _), part, up in zip(layout, parts, ups, strict=True)
            ]
        grad_x = None
        if needs[0] and ctx.keeps:
            grad_x = g @ kept
        elif needs[0]:
            grad_x = g @ weight.to(g.dtype)
            for part, down in zip(hidden, downs, strict=True):
                grad_x = grad_x.addmm_(part, down.to(g.dtype))
        grad_weight = None
        if dense and x is not None:
            grad_weight = g.t() @ x
            grad_weight = grad_weight if g_kept is None else grad_weight + g_kept
        grads = [None] * (2 * len(layout))
        for index, ((scale, rows), up) in enumerate(zip(layout, ups, strict=True)):
            if not needs[_DOWN + 2 * index]:
                continue
            if grad_weight is not None:
                own = grad_weight if rows is None else grad_weight[rows[0] : rows[1]]
                grad = scale * (up.to(g.dtype).t() @ own)
            else:
                grad = hidden[index].t() @ x
            grads[2 * index + 1] = grad.to(ctx.types[index])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype) if needs[1] else None
        return grad_x, grad_weight, g.sum(0) if needs[2] else None, *(None,) * 4, *grads


def _dense_order(x: Tensor | None, weight: Tensor, ups: Sequence[Tensor]) -> bool:
    """Whether `B^T (g^T x)` takes fewer multiply-adds than `(g B)^T x`."""
    if x is None:
        return False
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    rank = sum(up.shape[1] for up in ups)
    first = (tokens + rank) * out_features * in_features
    return first < tokens * rank * (out_features + in_features)
