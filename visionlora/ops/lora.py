r"""A linear layer and its low-rank branches as one differentiable function.

    y = x W^T + b,   y[:, rows_i] += s_i (z A_i^T) B_i^T

`z` is the input of the branches: `x`, or `x` after dropout, or `x` with its slices added. Written
as plain autograd this costs a temporary of the size of `y` for the branch, one for its scaled copy
and one for the sum; here the branch accumulates into the base output (`addmm_`), the scale is
applied to tensors of width r, and all branches of a layer share one product with the stacked `A_i`
and one saved input. Backward, with `g = dL/dy`:

    gh_i = s_i g[:, rows_i] B_i,  dB_i = s_i g[:, rows_i]^T h_i,  dA = gh^T z,  dx = g W + gh A

Where one factor is frozen and the rank is large, the changed weight `W' = W + s B A`, built in
scratch, saves products: with A frozen the backward needs no `gh`, so `dx = g W'`; for a frozen B
see `visionlora.ops.frozen_up`.

Saved for backward: `z` (only if some A is trained), `h` (only if some B is trained), and
references to the weights. The backward is itself differentiable, so second-order methods work: `h`
is a second output, because a saved tensor that is neither input nor output counts as a constant.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visionlora.ops import frozen_up
from visionlora.ops.frozen_up import changed

Frozen = Literal["up", "down", ""]


class Branch(NamedTuple):
    """One low-rank branch: factors, scale, and the output rows it adds to (None for all)."""

    up: Tensor
    down: Tensor
    scale: float
    rows: tuple[int, int] | None = None
    frozen: Frozen = ""
    """Which factor never trains."""


# Below this rank writing the changed weight costs more time than the products it saves.
_LARGE_RANK = 64


def multiply_adds(
    tokens: int, rank: int, out_features: int, in_features: int, frozen: Frozen
) -> int:
    """Return the multiply-adds of one training step of a branch, beside the base layer's."""
    thin = tokens * rank * (out_features + in_features)
    build = rank * out_features * in_features
    if rank >= _LARGE_RANK and build < thin:
        if frozen == "up":
            return build + frozen_up.backward_multiply_adds(tokens, rank, out_features, in_features)
        if frozen == "down":
            return build + tokens * rank * (2 * out_features + in_features)
    return 3 * thin


def lora_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    branches: list[Branch],
    z: Float[Tensor, "*batch folded"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Return `x W^T + b` with all branches added in place.

    Args:
        x: input, `(*batch, in)`.
        weight: frozen weight, `(out, in)`.
        bias: `(out,)` or None.
        branches: factors `up (rows, r_i)` and `down (r_i, in_z)`, with scales.
        z: input of the branches, `(*batch, in_z)`; None means `x`.

    Returns:
        `(*batch, out)` in the compute type of `x` (the autocast type where autocast is on).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which torch never casts
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        z = None if z is None else z.to(dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x, weight, bias, branches, z)
    return _apply(x, weight, bias, branches, z)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch], z: Tensor | None
) -> Tensor:
    layout = tuple((branch.scale, branch.rows) for branch in branches)
    factors = [tensor for branch in branches for tensor in (branch.up, branch.down)]
    if torch.compiler.is_compiling():  # the compiler takes no tensor twice; slices may share one
        factors = [
            item.view_as(item) if any(item is other for other in factors[:index]) else item
            for index, item in enumerate(factors)
        ]
    x2 = x.reshape(-1, x.shape[-1])
    z2 = None if z is None else z.reshape(-1, z.shape[-1])
    merged = _merged(branches, weight, x2.shape[0]) if z is None else ""
    if merged == "up":
        y = frozen_up.frozen_up_linear(x2, weight, bias, layout, factors)
    else:
        y, _ = _LoRALinear.apply(x2, z2, weight, bias, layout, merged == "down", *factors)
    return y.view(*x.shape[:-1], weight.shape[0])


def _merged(branches: list[Branch], weight: Tensor, tokens: int) -> Frozen:
    """Return the factor that is frozen in all branches, if the changed weight is cheaper."""
    frozen = branches[0].frozen
    trains = any(branch.up.requires_grad for branch in branches) and frozen == "up"
    if trains or any(branch.frozen != frozen for branch in branches):
        return ""
    rank = sum(branch.up.shape[1] for branch in branches)
    out_features, in_features = weight.shape
    pays = tokens * (out_features + in_features) > out_features * in_features
    return frozen if pays and rank >= _LARGE_RANK else ""


def _stack(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _rows(y: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return y if rows is None else y[:, rows[0] : rows[1]]


class _LoRALinear(torch.autograd.Function):
    """See the module docstring; x and z are 2-D here."""

    @staticmethod
    def forward(ctx, x, z, weight, bias, layout, merged, *factors):  # type: ignore[no-untyped-def]
        ups, downs = factors[0::2], factors[1::2]
        dtype = x.dtype
        bias = None if bias is None else bias.to(dtype)
        # needs_input_grad: x, z, weight, bias, layout, merged, up_0, down_0, up_1, down_1, ...
        trains_up = any(ctx.needs_input_grad[6::2])
        trains_down = any(ctx.needs_input_grad[7::2])
        y = F.linear(x, weight.to(dtype), bias)
        h = (x if z is None else z) @ _stack(downs, dtype).t()
        start = 0
        for (scale, rows), up in zip(layout, ups, strict=True):
            part = h[:, start : start + up.shape[1]]
            _rows(y, rows).addmm_(part, up.to(dtype).t(), alpha=scale)
            start += up.shape[1]
        keeps_x = ctx.needs_input_grad[2] or (z is None and trains_down)
        ctx.layout = layout
        ctx.merged = merged and not trains_down
        ctx.separate = z is not None
        ctx.dtype = dtype
        ctx.save_for_backward(
            x if keeps_x else None,
            z if trains_down else None,
            h if trains_up else None,
            weight,
            *factors,
        )
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, g, g_hidden):  # type: ignore[no-untyped-def]
        x, z, h, weight, *factors = ctx.saved_tensors
        ups, downs = factors[0::2], factors[1::2]
        needs = ctx.needs_input_grad
        dtype = ctx.dtype
        if g is None and g_hidden is None:
            return (None,) * len(needs)
        if g is None:  # second order: only the hidden output was used
            g = g_hidden.new_zeros(g_hidden.shape[0], weight.shape[0])
        merged = ctx.merged and g_hidden is None
        hidden, grad_ups, start = [], [], 0
        for index, ((scale, rows), up) in enumerate(zip(ctx.layout, ups, strict=True)):
            part = _rows(g, rows)
            # A contiguous B^T here, and h^T g instead of g^T h below: the same sums, in the layout
            # in which thin matrix products are up to nine times faster.
            if not merged:
                hidden.append(F.linear(part, up.to(dtype).t().contiguous()).mul_(scale))
            grad = None
            if needs[6 + 2 * index]:
                used = h[:, start : start + up.shape[1]]
                grad = (used.t() @ part).mul_(scale).t().to(up.dtype)
            grad_ups.append(grad)
            start += up.shape[1]
        grad_x = grad_z = None
        if merged:
            whole = changed(weight.to(dtype), ctx.layout, ups, downs) if needs[0] else None
            grad_x = None if whole is None else g @ whole
        else:
            gh = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
            if g_hidden is not None:
                gh = gh + g_hidden
            down = _stack(tuple(downs), dtype)
            grad_x = g @ weight.to(dtype) if needs[0] else None
            if ctx.separate:
                grad_z = gh @ down if needs[1] else None
            elif grad_x is not None:
                grad_x = grad_x.addmm_(gh, down)
        grad_weight = (g.t() @ x).to(weight.dtype) if needs[2] else None
        grad_bias = g.sum(0) if needs[3] else None  # autograd casts to the type of the bias
        grad_downs = [None] * len(downs)
        if any(needs[7::2]):
            stacked = gh.t() @ (z if ctx.separate else x)
            pieces = stacked.split([item.shape[0] for item in downs])
            grad_downs = [
                piece.to(item.dtype) if needs[7 + 2 * index] else None
                for index, (piece, item) in enumerate(zip(pieces, downs, strict=True))
            ]
        grads = [item for pair in zip(grad_ups, grad_downs, strict=True) for item in pair]
        return grad_x, grad_z, grad_weight, grad_bias, None, None, *grads
