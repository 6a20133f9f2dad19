r"""A linear layer and its low-rank branches as one differentiable function.

    y = x W^T + b,   y[:, rows_i] += s_i (z A_i^T) B_i^T

`z` is the input of the branches: `x`, or `x` after dropout, or `x` with its slices added. Written
as plain autograd this costs a temporary of the size of `y` for the branch, one for its scaled copy
and one for the sum; here the branch accumulates into the base output (`addmm_`), the scale is
applied to tensors of width r, and all branches of a layer share one product with the stacked `A_i`
and one saved input. Backward, with `g = dL/dy`:

    gh_i = s_i g[:, rows_i] B_i,  dB_i = s_i g[:, rows_i]^T h_i,  dA = gh^T z,  dx = g W + gh A

Saved for backward: `z` (only if some A is trained), `h` (only if some B is trained), and
references to the weights. The backward is itself differentiable, so second-order methods work: `h`
is a second output, because a saved tensor that is neither input nor output counts as a constant.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Branch(NamedTuple):
    """One low-rank branch: factors, scale, and the output rows it adds to (None for all)."""

    up: Tensor
    down: Tensor
    scale: float
    rows: tuple[int, int] | None = None


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
    x2 = x.reshape(-1, x.shape[-1])
    z2 = None if z is None else z.reshape(-1, z.shape[-1])
    y, _ = _LoRALinear.apply(x2, z2, weight, bias, layout, *factors)
    return y.view(*x.shape[:-1], weight.shape[0])


def _stack(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _rows(y: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return y if rows is None else y[:, rows[0] : rows[1]]


class _LoRALinear(torch.autograd.Function):
    """See the module docstring; x and z are 2-D here."""

    @staticmethod
    def forward(ctx, x, z, weight, bias, layout, *factors):  # type: ignore[no-untyped-def]
        ups, downs = factors[0::2], factors[1::2]
        dtype = x.dtype
        source = x if z is None else z
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        h = source @ _stack(downs, dtype).t()
        start = 0
        for (scale, rows), up in zip(layout, ups, strict=True):
            part = h[:, start : start + up.shape[1]]
            _rows(y, rows).addmm_(part, up.to(dtype).t(), alpha=scale)
            start += up.shape[1]
        # needs_input_grad: x, z, weight, bias, layout, up_0, down_0, up_1, down_1, ...
        trains_up = any(ctx.needs_input_grad[5::2])
        trains_down = any(ctx.needs_input_grad[6::2])
        keeps_x = ctx.needs_input_grad[2] or (z is None and trains_down)
        ctx.layout = layout
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
        hidden, grad_ups, start = [], [], 0
        for index, ((scale, rows), up) in enumerate(zip(ctx.layout, ups, strict=True)):
            part = _rows(g, rows)
            # A contiguous B^T here, and h^T g instead of g^T h below: the same sums, in the layout
            # in which thin matrix products are up to nine times faster.
            hidden.append(F.linear(part, up.to(dtype).t().contiguous()).mul_(scale))
            grad = None
            if needs[5 + 2 * index]:
                used = h[:, start : start + up.shape[1]]
                grad = (used.t() @ part).mul_(scale).t().to(up.dtype)
            grad_ups.append(grad)
            start += up.shape[1]
        gh = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
        if g_hidden is not None:
            gh = gh + g_hidden
        down = _stack(tuple(downs), dtype)
        grad_x = g @ weight.to(dtype) if needs[0] else None
        grad_z = None
        if ctx.separate:
            grad_z = gh @ down if needs[1] else None
        elif grad_x is not None:
            grad_x = grad_x.addmm_(gh, down)
        grad_weight = (g.t() @ x).to(weight.dtype) if needs[2] else None
        grad_bias = g.sum(0) if needs[3] else None  # autograd casts to the type of the bias
        grad_downs = [None] * len(downs)
        if any(needs[6::2]):
            stacked = gh.t() @ (z if ctx.separate else x)
            pieces = stacked.split([item.shape[0] for item in downs])
            grad_downs = [
                piece.to(item.dtype) if needs[6 + 2 * index] else None
                for index, (piece, item) in enumerate(zip(pieces, downs, strict=True))
            ]
        grads = [item for pair in zip(grad_ups, grad_downs, strict=True) for item in pair]
        return grad_x, grad_z, grad_weight, grad_bias, None, *grads
