r"""One representative of all factor pairs with the same product.

A change `B A` does not determine its factors: `(B M)(M^-1 A)` is the same change for every
invertible M, so the factors of two runs cannot be compared entry by entry. The balanced form can:

    B A = U S V^T,   B' = U S^(1/2),   A' = S^(1/2) V^T,   B' A' = B A

with singular values in falling order and, in every column of U, the entry of largest size positive.
Near a tie, of two singular values or of two entries, a small step of training swaps or turns
columns. The snapshots of one task are therefore turned towards a reference (derived):

    B'' = B' Q,   A'' = Q^T A',   Q = argmin |B' Q - B_ref|^2 + |Q^T A' - A_ref|^2
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.sites import Site


def canonical_pair(
    A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return the balanced pair `(A', B')` with `B' A' = B A`; the rank is at most `min(out, in)`.

    The product is never formed: two QR decompositions reduce the SVD to a rank x rank matrix.
    """
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.double().T)
    u, values, vh = torch.linalg.svd(upper @ lower.T)
    u, v = left @ u, right @ vh.T
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    root = values.sqrt() * torch.where(largest < 0, -1.0, 1.0)
    return (v * root).T.to(A.dtype).contiguous(), (u * root).to(B.dtype).contiguous()


def aligned_pair(
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    reference: tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]],
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return the pair `(Q^T A, B Q)` nearest to `reference`, with the same product."""
    there, up = (item.double() for item in reference)
    u, _, vh = torch.linalg.svd(B.double().T @ up + A.double() @ there.T)
    q = u @ vh
    return (q.T @ A.double()).to(A.dtype), (B.double() @ q).to(B.dtype)


def canonical_tensors(
    tensors: Mapping[str, Tensor],
    sites: Iterable[Site],
    reference: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA adapter file with the pair of every site made canonical.

    Args:
        tensors: by file key.
        sites: those of the adapter.
        reference: a canonical adapter of the same task, towards which the pairs are turned.
    """
    result = dict(tensors)
    for site in sites:
        a, b = f"adapter.{site.name}.A", f"adapter.{site.name}.B"
        result[a], result[b] = canonical_pair(result[a], result[b])
        if reference is not None:
            result[a], result[b] = aligned_pair(result[a], result[b], (reference[a], reference[b]))
    return result
