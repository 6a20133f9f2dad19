r"""Algebra of a factor pair `P = B A` that never forms the product, `out x in`.

Exact singular values (two thin QR factorisations and one small SVD, (out + in) r^2 operations):

    B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T   =>   P = (Q_B U) S (Q_A V)^T

The best approximation of rank t keeps the first t triples and splits S evenly over both factors;
its error is the root of the sum of the dropped squares (Eckart and Young 1936).

For very wide pairs the first k triples can be had from k + 8 random probes and two stabilised power
steps (Halko, Martinsson and Tropp 2011, arXiv 0909.4061), which costs (out + in) r (k + 8).

Everything runs in at least float32. `B` is `out x r` ("up"), `A` is `r x in` ("down").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Triples:
    """Leading singular triples of a product, or of a stack of products, largest first."""

    left: Float[Tensor, "*stack out k"]
    values: Float[Tensor, "*stack k"]
    right: Float[Tensor, "*stack k in"]
    missing: float = 0.0
    """Sum of the squares of the singular values that were not computed."""

    @property
    def energy(self) -> float:
        """Sum of the squares of all singular values: the squared norm of the product."""
        return float(self.values.double().square().sum()) + self.missing

    @property
    def spectrum(self) -> Float[Tensor, " k"]:
        """The values; over a stack, the root of the sum of their squares at each place."""
        return self.values if self.values.dim() == 1 else self.values.flatten(0, -2).norm(dim=0)

    def pair(self, rank: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return `(B', A')` with `B' A' = factor * P_rank`, split evenly over both factors.

        A direction of value zero gets a zero column in B' and a row as long as the longest in A':
        were both zero, it could never train again.
        """
        root = (abs(factor) * self.values[..., :rank]).sqrt()
        longest = root.max() if bool((root > 0).any()) else root.new_ones(())
        empty = root.square() <= torch.finfo(root.dtype).eps * longest.square()
        up = root.masked_fill(empty, 0.0) * (-1.0 if factor < 0 else 1.0)
        down = torch.where(empty, longest, root)
        return self.left[..., :rank] * up[..., None, :], down[..., None] * self.right[..., :rank, :]

    def error(self, rank: int) -> float:
        """Return the Frobenius norm of what `rank` triples leave out."""
        return (float(self.values[..., rank:].double().square().sum()) + self.missing) ** 0.5


@torch.no_grad()
def singular_triples(
    up: Float[Tensor, "*stack out r"], down: Float[Tensor, "*stack r in"]
) -> Triples:
    """Return all singular triples of `up @ down`, exactly."""
    up, down = _at_least_float(up), _at_least_float(down)
    left, left_small = torch.linalg.qr(up)
    right, right_small = torch.linalg.qr(down.mT)
    inner, values, outer = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    return Triples(left @ inner, values, outer @ right.mT)


@torch.no_grad()
def leading_triples(
    up: Float[Tensor, "out r"],
    down: Float[Tensor, "r in"],
    count: int,
    generator: torch.Generator,
    *,
    probes: int = 8,
    powers: int = 2,
) -> Triples:
    """Return approximately the first `count` singular triples of `up @ down`.

    Args:
        up: left factor.
        down: right factor.
        count: how many triples.
        generator: CPU generator of the random probes.
        probes: how many probes more than triples.
        powers: power steps; each makes small singular values matter less.
    """
    up, down = _at_least_float(up), _at_least_float(down)
    wide = min(count + probes, up.shape[0], down.shape[1])
    noise = torch.randn(down.shape[1], wide, generator=generator).to(down)
    found = up @ (down @ noise)
    for _ in range(powers):
        back = torch.linalg.qr(down.t() @ (up.t() @ torch.linalg.qr(found).Q)).Q
        found = up @ (down @ back)
    basis = torch.linalg.qr(found).Q
    inner, values, right = torch.linalg.svd((basis.t() @ up) @ down, full_matrices=False)
    values = values[:count]
    rest = squared_norm(up, down) - float(values.double().square().sum())
    return Triples((basis @ inner)[:, :count], values, right[:count], max(rest, 0.0))


@torch.no_grad()
def squared_norm(up: Float[Tensor, "out r"], down: Float[Tensor, "r in"]) -> float:
    """Return the squared Frobenius norm of `up @ down`, from two r x r products."""
    up, down = up.double(), down.double()
    return max(float(((up.t() @ up) * (down @ down.t())).sum()), 0.0)


def stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return one pair whose product is the sum of the products, of the summed rank."""
    return torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs])


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
