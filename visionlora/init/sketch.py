r"""A linear two-sided sketch of a sum of matrices (Tropp et al. 2017, arXiv 1609.00048).

    Y = sum_i w_i G_i Om       Y: out x k,         Om: in x k
    Z = sum_i w_i Psi G_i      Z: (2k + 1) x in,   Psi: (2k + 1) x out
    G ~ Q (Psi Q)^+ Z,         Q: orthonormal basis of Y's columns

Both are linear in G, so they are added up over batches and processes, whatever their order, and no
gradient is kept. What comes back has rank k at most; it is exact if G has rank k, and otherwise its
leading singular vectors are good where the spectrum decays: take k several times the rank that is
wanted. Om and Psi are normal, drawn from the site's name.

Memory: (3k + 1) (out + in) numbers instead of out * in, counting Om and Psi; where that saves
nothing, the plain sum is kept, which is exact.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.sites import Site, named_generator


class Total(Protocol):
    """A weighted sum of matrices of one shape."""

    def add(self, matrix: Float[Tensor, "out in"], weight: float) -> None:
        """Add `weight * matrix`."""

    def tensors(self) -> list[Tensor]:
        """Return what has to be added up over processes, to be changed in place."""

    def result(self) -> Float[Tensor, "out in"]:
        """Return the sum."""


class Plain:
    """The sum itself."""

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        self.total = torch.zeros(site.out_features, site.in_features, dtype=dtype)

    def add(self, matrix: Float[Tensor, "out in"], weight: float) -> None:
        """Add `weight * matrix`."""
        self.total.add_(matrix, alpha=weight)

    def tensors(self) -> list[Tensor]:
        """Return the sum."""
        return [self.total]

    def result(self) -> Float[Tensor, "out in"]:
        """Return the sum."""
        return self.total


class Sketch:
    """The two products of a sum, from which its leading part comes back.

    Args:
        site: the view whose matrices are added up; its name seeds the random matrices.
        name: the site's name in the model that is looked at.
        columns: k, the number of columns of the sketch.
        dtype: float32 or wider.
    """

    def __init__(self, site: Site, name: str, columns: int, dtype: torch.dtype) -> None:
        out, into, rows = site.out_features, site.in_features, 2 * columns + 1
        generator = named_generator(0, f"sketch:{name}")
        self.right = torch.empty(into, columns, dtype=dtype).normal_(generator=generator)
        self.left = torch.empty(rows, out, dtype=dtype).normal_(generator=generator)
        self.Y = torch.zeros(out, columns, dtype=dtype)
        self.Z = torch.zeros(rows, into, dtype=dtype)

    def add(self, matrix: Float[Tensor, "out in"], weight: float) -> None:
        """Add `weight * matrix`."""
        self.Y.addmm_(matrix, self.right, alpha=weight)
        self.Z.addmm_(self.left, matrix, alpha=weight)

    def tensors(self) -> list[Tensor]:
        """Return Y and Z."""
        return [self.Y, self.Z]

    def result(self) -> Float[Tensor, "out in"]:
        """Return the matrix of rank k that the products belong to."""
        basis = torch.linalg.qr(self.Y.double()).Q
        inner = torch.linalg.lstsq(self.left.double() @ basis, self.Z.double()).solution
        return (basis @ inner).to(self.Y.dtype)


def total_of(site: Site, name: str, columns: int | None, dtype: torch.dtype) -> Total:
    """Return an empty sum: a sketch of so many columns, or a plain one where that is no larger."""
    if columns is not None:
        out, into = site.out_features, site.in_features
        if (3 * columns + 1) * (out + into) < out * into:
            return Sketch(site, name, columns, dtype)
    return Plain(site, dtype)
