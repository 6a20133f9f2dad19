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

A branch may have a gain `a`, a constant per output that multiplies the gradients of its factors
(ALLoRA) and, if asked, that of the input, while the forward has none of it:

    dB_i = s_i a * (g[:, rows_i]^T h_i),   dA_i = (s_i g[:, rows_i] (a * B_i))^T z

which costs the columns `a * B_i` beside `B_i` in the product that makes `gh`.

Saved for backward: `z` (only if some A is trained; or what it can be made of again, see
`visionlora.ops.rebuilt`), `h` (only if some B is trained), and references to the weights. The
backward is itself differentiable, so second-order methods work: `h` is a second output, because a
saved tensor that is neither input nor output counts as a constant.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visionlora.ops import frozen_up
from visionlora.ops.frozen_up import changed
from visionlora.ops.rebuilt import Rebuilt

Frozen = Literal["up", "down", ""]
Gain = tuple[Tensor | None, bool]
"""Gain of a branch, and whether it reaches the input."""


class Branch(NamedTuple):
    """One low-rank branch: factors, scale, and the output rows it adds to (None for all)."""

    up: Tensor
    down: Tensor
    scale: float
    rows: tuple[int, int] | None = None
    frozen: Frozen = ""
    """Which factor never trains."""
    gain: Tensor | None = None
    """Factor `(rows,)` of the gradients of `up` and `down`, a constant."""
    gain_to_input: bool = False
    """Whether the gradient of the input has the gain too."""


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
    rebuilt: Rebuilt | None = None,
) -> Float[Tensor, "*batch out"]:
    """Return `x W^T + b` with all branches added in place.

    Args:
        x: input, `(*batch, in)`.
        weight: frozen weight, `(out, in)`.
        bias: `(out,)` or None.
        branches: factors `up (rows, r_i)` and `down (r_i, in_z)`, with scales.
        z: input of the branches, `(*batch, in_z)`; None means `x`.
        rebuilt: what the input of the branches is made of, to be kept in its place.

    Returns:
        `(*batch, out)` in the compute type of `x` (the autocast type where autocast is on).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which torch never casts
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        z = None if z is None else z.to(dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x, weight, bias, branches, z, rebuilt)
    return _apply(x, weight, bias, branches, z, rebuilt)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: list[Branch],
    z: Tensor | None,
    rebuilt: Rebuilt | None,
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
        y = frozen_up.frozen_up_linear(x2, weight, bias, layout, factors, rebuilt)
    else:
        gains = tuple((branch.gain, branch.gain_to_input) for branch in branches)
        origin, make = rebuilt or (None, None)
        y, _ = _LoRALinear.apply(
            x2, z2, weight, bias, origin, make, layout, merged == "down", gains, *factors
        )
    return y.view(*x.shape[:-1], weight.shape[0])


def _merged(branches: list[Branch], weight: Tensor, tokens: int) -> Frozen:
    """Return the factor that is frozen in all branches, if the changed weight is cheaper."""
    frozen = branches[0].frozen
    trains = any(branch.up.requires_grad for branch in branches) and frozen == "up"
    if trains or any(branch.frozen != frozen or branch.gain is not None for branch in branches):
        return ""
    rank = sum(branch.up.shape[1] for branch in branches)
    out_features, in_features = weight.shape
    pays = tokens * (out_features + in_features) > out_features * in_features
    return frozen if pays and rank >= _LARGE_RANK else ""


def _stack(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _hidden_gradients(
    g: Tensor, up: Tensor, scale: float, gain: Gain, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return `s g B` for the input and for the down-matrix, of which only those wanted count."""
    factor, to_input = gain
    # A contiguous B^T here, and h^T g instead of g^T h in the backward: the same sums, in the
    # layout in which thin matrix products are up to nine times faster.
    columns = up.to(g.dtype).t().contiguous()
    if factor is not None:
        scaled = (up * factor[:, None]).to(g.dtype).t().contiguous()
        if all(wanted) and not to_input:
            both = F.linear(g, torch.cat([columns, scaled])).mul_(scale)
            return both[:, : up.shape[1]], both[:, up.shape[1] :]
        columns = scaled if to_input or wanted[1] else columns
    hidden = F.linear(g, columns).mul_(scale)
    return hidden, hidden


def _rows(y: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return y if rows is None else y[:, rows[0] : rows[1]]


# Places of `up_0` and `down_0` among the arguments: x, z, weight, bias, origin, make, layout,
# merged, gains, up_0, down_0, up_1, down_1, ...
_UP, _DOWN = 9, 10


class _LoRALinear(torch.autograd.Function):
    """See the module docstring; x and z are 2-D here."""

    @staticmethod
    def forward(ctx, x, z, weight, bias, origin, make, layout, merged, gains, *factors):  # type: ignore[no-untyped-def]
        ups, downs = factors[0::2], factors[1::2]
        dtype = x.dtype
        bias = None if bias is None else bias.to(dtype)
        trains_up = any(ctx.needs_input_grad[_UP::2])
        trains_down = any(ctx.needs_input_grad[_DOWN::2])
        y = F.linear(x, weight.to(dtype), bias)
        h = (x if z is None else z) @ _stack(downs, dtype).t()
        start = 0
        for (scale, rows), up in zip(layout, ups, strict=True):
            part = h[:, start : start + up.shape[1]]
            _rows(y, rows).addmm_(part, up.to(dtype).t(), alpha=scale)
            start += up.shape[1]
        keeps_x = ctx.needs_input_grad[2] or (z is None and trains_down)
        ctx.layout, ctx.gains = layout, gains
        ctx.merged = merged and not trains_down
        ctx.separate = z is not None
        ctx.dtype, ctx.make = dtype, make
        ctx.save_for_backward(
            x if keeps_x and (make is None or ctx.separate) else None,
            z if trains_down and make is None else None,
            origin if trains_down or (keeps_x and z is None) else None,
            h if trains_up else None,
            weight,
            *factors,
        )
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, g, g_hidden):  # type: ignore[no-untyped-def]
        x, z, origin, h, weight, *factors = ctx.saved_tensors
        ups, downs = factors[0::2], factors[1::2]
        needs = ctx.needs_input_grad
        dtype = ctx.dtype
        if g is None and g_hidden is None:
            return (None,) * len(needs)
        if origin is not None:
            made = ctx.make(origin)
            made = made.to(dtype).reshape(-1, made.shape[-1])
            x, z = (x, made) if ctx.separate else (made, None)
        if g is None:  # second order: only the hidden output was used
            g = g_hidden.new_zeros(g_hidden.shape[0], weight.shape[0])
        merged = ctx.merged and g_hidden is None
        wanted = needs[1] if ctx.separate else needs[0], any(needs[_DOWN::2])
        hidden, grad_ups, start = [], [], 0
        for index, (place, up, gain) in enumerate(zip(ctx.layout, ups, ctx.gains, strict=True)):
            scale, rows = place
            part = _rows(g, rows)
            if not merged:
                hidden.append(_hidden_gradients(part, up, scale, gain, wanted))
            grad = None
            if needs[_UP + 2 * index]:
                used = h[:, start : start + up.shape[1]]
                grad = (used.t() @ part).mul_(scale).t().to(up.dtype)
                grad = grad if gain[0] is None else grad * gain[0][:, None].to(up.dtype)
            grad_ups.append(grad)
            start += up.shape[1]
        grad_x = grad_z = None
        if merged:
            whole = changed(weight.to(dtype), ctx.layout, ups, downs) if needs[0] else None
            grad_x = None if whole is None else g @ whole
        else:
            gh = gh_down = _beside([item for item, _ in hidden])
            if any(gain is not None for gain, _ in ctx.gains):
                gh_down = _beside([item for _, item in hidden])
            if g_hidden is not None:
                gh, gh_down = gh + g_hidden, gh_down + g_hidden
            down = _stack(tuple(downs), dtype)
            grad_x = g @ weight.to(dtype) if needs[0] else None
            if ctx.separate:
                grad_z = gh @ down if needs[1] else None
            elif grad_x is not None:
                grad_x = grad_x.addmm_(gh, down)
        grad_weight = (g.t() @ x).to(weight.dtype) if needs[2] else None
        grad_bias = g.sum(0) if needs[3] else None  # autograd casts to the type of the bias
        grad_downs = [None] * len(downs)
        if any(needs[_DOWN::2]):
            stacked = gh_down.t() @ (z if ctx.separate else x)
            pieces = stacked.split([item.shape[0] for item in downs])
            grad_downs = [
                piece.to(item.dtype) if needs[_DOWN + 2 * index] else None
                for index, (piece, item) in enumerate(zip(pieces, downs, strict=True))
            ]
        grads = [item for pair in zip(grad_ups, grad_downs, strict=True) for item in pair]
        return grad_x, grad_z, grad_weight, grad_bias, *(None,) * (_UP - 4), *grads
