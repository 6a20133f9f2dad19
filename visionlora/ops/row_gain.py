r"""Gradients with a factor per output row, behind a forward that has none.

    y = f(x, B, A),   dL/d(B, A): as if dL/dy_i were a_i dL/dy_i,   dL/dx: with or without a

The factors `a` are constants. `visionlora.ops.lora` has this built in for linear layers, at the
cost of a thin product; here is the form for everything that goes through plain autograd.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def scale_gradient(x: Tensor, gain: Tensor) -> Tensor:
    """Return `x`, whose gradient is multiplied by `gain`, a constant that broadcasts over it."""
    scaled: Tensor = _ScaleGradient.apply(x, gain.detach())
    return scaled


def with_gain(
    branch: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    up: Float[Tensor, "out rank"],
    down: Float[Tensor, "rank in"],
    gain: Tensor | None,
    to_input: bool,
) -> Tensor:
    """Return `branch(x, up, down)`; the gradients of the factors, and of x if asked, have the gain.

    Where x has its true gradient, the branch is computed twice (derived): once for the factors and
    once, less its own value, for x.

    Args:
        branch: the change of the output.
        x: its input, indices included.
        up: up-matrix.
        down: down-matrix.
        gain: what broadcasts over the output, None for one.
        to_input: whether the gradient of x has the gain too.
    """
    if gain is None:
        return branch(x, up, down)
    y = scale_gradient(branch(x if to_input else x.detach(), up, down), gain)
    if to_input or not x.requires_grad:
        return y
    same = branch(x, up.detach(), down.detach())
    return y + (same - same.detach())


@torch.no_grad()
def row_norms(
    up: Float[Tensor, "out rank"], down: Float[Tensor, "rank folded"], fold: int = 1
) -> Float[Tensor, " out"]:
    """Return the norm of every row of `up @ [down ... down]`, without the product.

    `|(B A)_i|^2 = b_i (A A^T) b_i`: r^2 (out + in) multiply-adds, in full precision also where
    autocast is on.
    """
    with torch.autocast(up.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
        up, down = up.to(dtype), down.to(dtype)
        squared = ((up @ (down @ down.t())) * up).sum(1)
        return (fold * squared).clamp_min(0.0).sqrt()


class _ScaleGradient(torch.autograd.Function):
    """The identity; backward multiplies."""

    @staticmethod
    def forward(ctx, x, gain):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gain)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (gain,) = ctx.saved_tensors
        return g * gain.to(g.dtype), None
