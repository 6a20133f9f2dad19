"""Kronecker products of two small matrices, applied without forming them.

(P (x) Q) vec(X) = vec(P X Q^T): X is the input cut into rows, and vec reads X row by row.
"""

import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor


def split(number: int, factor: int | None = None) -> tuple[int, int]:
    """Return `(m, n)` with `m n = number`.

    Without a factor m is the largest divisor up to the square root. A factor that divides the
    number is m itself; of any other, m is the largest divisor below it and below the square root.
    """
    if factor is not None and number % factor == 0:
        return factor, number // factor
    limit = number if factor is None else factor
    m = max(d for d in range(1, int(number**0.5) + 1) if number % d == 0 and d <= limit)
    return m, number // m


def mix(
    matrix: Float[Tensor, "a c"], x: Float[Tensor, "*batch c k"]
) -> Float[Tensor, "*batch a k"]:
    """Return `matrix @ x` for every item of a batch, as one product."""
    return F.linear(x.transpose(-1, -2), matrix).transpose(-1, -2)


def columns(
    left: Float[Tensor, "a c"], right: Float[Tensor, "b e"], index: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch out"]:
    """Return the columns `index` of the Kronecker product of `left` and `right`."""
    width = right.shape[1]
    first = F.embedding(index // width, left.t())
    second = F.embedding(index % width, right.t())
    return (first[..., :, None] * second[..., None, :]).flatten(-2)
