r"""Residual quantiser with one gate per doubling of the bit width (BayesianBits).

van Baalen et al. 2020, arXiv 2005.07093. With a symmetric range beta and x clipped to +-beta,

    s_2 = 2 beta / 3,  s_2b = s_b / (2^b + 1)          so that s_b = 2 beta / (2^b - 1)
    x_2 = s_2 round(x / s_2),  e_b = s_b round((x - x_{b/2}) / s_b)
    Q(x) = x_2 + z_4 (e_4 + z_8 (e_8 + z_16 (e_16 + z_32 e_32)))

With all gates up to b open and the rest closed, Q is rounding to the b-bit grid {k s_b}, where
|k| <= 2^(b-1) - 1. A closed gate makes all wider ones irrelevant. Rounding passes gradients through
as if nothing had been rounded; clipping passes those of clipped entries to beta, as PACT does.
Everything runs in at least float32.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

WIDTHS = (4, 8, 16, 32)
"""Bit widths that have a gate; two bits are always on."""

_INSIDE = 1.0 - 1e-7  # an entry at the very end of the range would round to a level beyond it
_PACKED = (2, 4)  # widths of which several levels share a byte


def step_size(beta: Tensor, bits: int) -> Tensor:
    """Return the distance of two levels of the `bits`-bit grid on [-beta, beta]."""
    return 2.0 * beta / (2**bits - 1)


def residual_quantize(
    x: Float[Tensor, "*shape"], beta: Float[Tensor, "1"], gates: Float[Tensor, "4"]
) -> Float[Tensor, "*shape"]:
    """Return Q(x).

    Args:
        x: the tensor.
        beta: positive end of the range.
        gates: z_4, z_8, z_16 and z_32, each in [0, 1].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    inner, beta = x.to(wide), beta.to(wide)
    limit = _INSIDE * beta
    inner = torch.minimum(torch.maximum(inner, -limit), limit)
    total = _round(inner, step_size(beta, 2))
    result, opened = total, torch.ones_like(beta)
    for gate, bits in zip(gates.to(wide), WIDTHS, strict=True):
        rest = _round(inner - total, step_size(beta, bits))
        total = total + rest
        opened = opened * gate
        result = result + opened * rest
    return result.to(x.dtype)


def to_levels(
    x: Float[Tensor, "*shape"], beta: Float[Tensor, "1"], bits: int
) -> Integer[Tensor, "*shape"]:
    """Return the levels k of entries that lie on the `bits`-bit grid."""
    levels = (x.double() / step_size(beta.double(), bits)).round()
    return levels.to(torch.int8 if bits <= 8 else torch.int16 if bits == 16 else torch.int32)


def from_levels(
    levels: Integer[Tensor, "*shape"], beta: Float[Tensor, "1"], bits: int
) -> Float[Tensor, "*shape"]:
    """Return k s_b in float64."""
    return levels.double() * step_size(beta.double(), bits)


def pack(levels: Integer[Tensor, "rows columns"], bits: int) -> Integer[Tensor, "..."]:
    """Put levels of two or four bits together into bytes, row after row; others stay."""
    if bits not in _PACKED:
        return levels
    each = 8 // bits
    flat = (levels.flatten() + 2 ** (bits - 1)).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each)
    result = torch.zeros_like(padded[:, 0])
    for place in range(each):
        result |= padded[:, place] << (bits * place)
    return result


def unpack(
    packed: Integer[Tensor, "..."], bits: int, shape: tuple[int, int]
) -> Integer[Tensor, "..."]:
    """Return the levels that `pack` was given."""
    if bits not in _PACKED:
        return packed
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8)
    flat = ((packed[:, None] >> shifts) & (2**bits - 1)).flatten()[: shape[0] * shape[1]]
    return flat.to(torch.int8).view(shape) - 2 ** (bits - 1)


def _round(x: Tensor, step: Tensor) -> Tensor:
    """Round to multiples of the step; gradients pass as if nothing had been rounded."""
    levels = x / step
    return step * (levels + (levels.round() - levels).detach())
