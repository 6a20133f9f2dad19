r"""Residual quantiser with one gate per doubling of the bit width (BayesianBits).

van Baalen et al. 2020, arXiv 2005.07093. With a symmetric range beta and x clipped to +-beta,

    s_2 = 2 beta / 3,  s_2b = s_b / (2^b + 1)          so that s_b = 2 beta / (2^b - 1)
    x_2 = s_2 round(x / s_2),  e_b = s_b round((x - x_{b/2}) / s_b)
    Q(x) = x_2 + z_4 (e_4 + z_8 (e_8 + z_16 (e_16 + z_32 e_32)))

With all gates up to b open and the rest closed, Q is rounding to the b-bit grid {k s_b}, where
|k| <= 2^(b-1) - 1. A closed gate makes all wider ones irrelevant. Rounding passes gradients through
unchanged; clipping passes those of clipped entries to beta, as PACT does.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDTHS = (4, 8, 16, 32)
"""Bit widths that have a gate; two bits are always on."""

_INSIDE = 1.0 - 1e-7  # an entry at the very end of the range would round to a level beyond it


def step_size(beta: Tensor, bits: int) -> Tensor:
    """Return the distance of two levels of the `bits`-bit grid on [-beta, beta]."""
    return 2.0 * beta / (2**bits - 1)


def clip(x: Float[Tensor, "*shape"], beta: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Clip to the range, with a gradient for both."""
    limit = _INSIDE * beta
    return torch.minimum(torch.maximum(x, -limit), limit)


def residual_quantize(
    x: Float[Tensor, "*shape"], beta: Float[Tensor, ""], gates: Float[Tensor, " 4"]
) -> Float[Tensor, "*shape"]:
    """Return Q(x).

    Args:
        x: the tensor.
        beta: positive end of the range.
        gates: z_4, z_8, z_16 and z_32, each in [0, 1].
    """
    x = clip(x, beta)
    total = _round(x, step_size(beta, 2))
    result, opened = total, torch.ones_like(gates[0])
    for gate, bits in zip(gates, WIDTHS, strict=True):
        rest = _round(x - total, step_size(beta, bits))
        total = total + rest
        opened = opened * gate
        result = result + opened * rest
    return result


def to_integers(
    x: Float[Tensor, "*shape"], beta: Float[Tensor, ""], bits: int
) -> Int[Tensor, "*shape"]:
    """Return the levels k of the `bits`-bit grid for entries that lie on it."""
    levels = (x.double() / step_size(beta.double(), bits)).round()
    return levels.to(torch.int8 if bits <= 8 else torch.int16 if bits == 16 else torch.int32)


def _round(x: Tensor, step: Tensor) -> Tensor:
    """Round to multiples of the step; gradients pass as if nothing had been rounded."""
    levels = x / step
    return step * (levels + (levels.round() - levels).detach())
