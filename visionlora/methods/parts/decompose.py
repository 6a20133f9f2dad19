"""Frozen factors of a weight, the same wherever they are computed: its SVD, its QR and its LDU.

All work in float64 on the CPU, whatever the weight's dtype and device, because files hold none of
these factors: they are computed again when a file is loaded. Two machines then agree to about 1e-13
unless the weight leaves a choice open (equal singular values, equal pivots); the fingerprint of the
factors in the file tells such a case apart.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError


@torch.no_grad()
def truncated_svd(
    weight: Float[Tensor, "out in"], rank: int, where: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Return `(U, S, V^T)` of the `rank` largest singular values, in float64 on the CPU.

    The signs are fixed: the entry of largest size in every column of U is positive. The space comes
    from the eigenvectors of the smaller Gram matrix, two to three times faster than a full SVD of a
    transformer's weights; an SVD inside that space makes both factors orthonormal to rounding.

    Args:
        weight: the frozen weight.
        rank: number of singular values to keep.
        where: name of the layer for messages.

    Raises:
        ConfigError: the weight holds NaN or infinity.
    """
    matrix = _exact(weight, where)
    if matrix.shape[0] >= matrix.shape[1]:
        U, S, V = _leading(matrix, rank)
    else:
        V, S, U = _leading(matrix.t(), rank)
    return _fix_signs(U, S, V.t())


@torch.no_grad()
def smallest_svd(
    weight: Float[Tensor, "out in"], rank: int, where: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Return `(U, S, V^T)` of the `rank` smallest singular values, in float64 on the CPU.

    The largest of them comes first, the signs are fixed as in `truncated_svd`. A full SVD, because
    small singular values lose half of their digits in a Gram matrix.

    Args:
        weight: the frozen weight.
        rank: number of singular values to keep.
        where: name of the layer for messages.

    Raises:
        ConfigError: the weight holds NaN or infinity.
    """
    U, S, V = torch.linalg.svd(_exact(weight, where), full_matrices=False)
    return _fix_signs(U[:, -rank:], S[-rank:], V[-rank:])


@torch.no_grad()
def leading_qr(
    weight: Float[Tensor, "out in"], rank: int, where: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the first `rank` columns of Q and rows of R of `Q R = W`, in float64 on the CPU.

    The diagonal of R is not negative. Only the first columns of W are orthogonalised: the others
    have no part in these columns of Q.

    Args:
        weight: the frozen weight.
        rank: number of columns and rows to keep.
        where: name of the layer for messages.

    Raises:
        ConfigError: the weight holds NaN or infinity.
    """
    matrix = _exact(weight, where)
    Q, R = torch.linalg.qr(matrix[:, :rank])
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return Q, (Q.t() @ matrix).triu()


@torch.no_grad()
def ldu(
    weight: Float[Tensor, "out in"], where: str
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Return `(P L, d, U)` with `P L diag(d) U = W`, in float64 on the CPU; k = min(out, in).

    P permutes rows (partial pivoting), L has a unit lower triangle and U a unit upper one. Where a
    pivot vanishes against the largest one, the weight is singular: that row of U stays as
    elimination left it, and its d is 1, so that the product is still W and everything is finite.

    Args:
        weight: the frozen weight.
        where: name of the layer for messages.

    Raises:
        ConfigError: the weight holds NaN or infinity.
    """
    matrix = _exact(weight, where)
    size = min(matrix.shape)
    packed, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    order = list(range(matrix.shape[0]))
    for step, pivot in enumerate(pivots.tolist()):  # rows are swapped one step after another
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    lower = packed[:, :size].tril(-1)
    lower.diagonal().fill_(1.0)
    left = torch.empty_like(lower)
    left[order] = lower
    upper = packed[:size].triu()
    d = upper.diagonal().clone()
    smallest = max(matrix.shape) * torch.finfo(matrix.dtype).eps * d.abs().max()
    d = torch.where(d.abs() <= smallest, 1.0, d)
    return left, d, upper / d[:, None]


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, singular values and right vectors of a matrix that is not wide."""
    basis = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:]
    left, values, mix = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left, values, basis @ mix.t()


def _fix_signs(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the entry of largest size in every column of U positive."""
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return U * signs, S, V * signs.t()


def _exact(weight: Tensor, where: str) -> Tensor:
    if weight.is_meta:
        raise ConfigError(f"the weight of {where} has no values yet (meta device): load them first")
    matrix = weight.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"the weight of {where} holds NaN or infinity: it has no decomposition")
    return matrix
