r"""Equivalent gradients: the best step of a factor pair (Wang et al. 2024, arXiv 2407.18242).

`Delta W = s B A`, `B: m x r`, `A: r x n`; `g = dL/dW` is the gradient of full fine-tuning, and the
pair only sees `gA = s B^T g` and `gB = s g A^T`. To first order a step along `(GA, GB)` moves W by

    E = s (B GA + GB A)                                                   the equivalent gradient

and the (GA, GB) with E closest to g are, for every r x r matrix X,

    GA = (B^T B)^-1 gA / s^2 + X A
    GB = (I - P_B) gB (A A^T)^-1 / s^2 - B X,     P_B = B (B^T B)^-1 B^T

all with `E = P_B g + (I - P_B) g P_A` and a loss that falls by `|E|^2` per unit of step. X only
decides how the step is shared out between A and B:

    sylvester   closest to (gA, gB):   B^T B X + X A A^T = -(B^T B)^-1 gA A^T / s^2
    zero        X = 0
    symmetric   X = -(B^T B)^-1 gA A^T (A A^T)^-1 / (2 s^2): both factors get the shared part evenly

Where a factor is zero, its Gram matrix counts as having the inverse 0: from B = 0, `GA = 0`,
`GB = gB (A A^T)^-1 / s^2` and `E = g P_A`. Elsewhere `d I` is added to Gram matrices before they
are inverted, `d = ridge * (mean eigenvalue)`, at least 1e-12 (derived; the reference code adds 1e-8
whatever their size).

Everything here is a function of tensors, batched over leading dimensions; Gram matrices and what
follows from them are in float64 where the device has it. O(r (m + n) r + r^3) operations.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Choice = Literal["sylvester", "zero", "symmetric"]
"""How the step is shared out between the factors."""

_FLOOR = 1e-12


class Gram(NamedTuple):
    """A Gram matrix of a factor, by its eigenvectors."""

    matrix: Float[Tensor, "*stack r r"]
    values: Float[Tensor, "*stack r"]
    vectors: Float[Tensor, "*stack r r"]
    inverse: Float[Tensor, "*stack r r"]
    """Regularised; zero where the factor is zero."""


@torch.no_grad()
def gram(factor: Float[Tensor, "*stack r d"], ridge: float = 1e-6) -> Gram:
    """Return the Gram matrix `F F^T` of the rows of a factor with its inverse.

    Args:
        factor: a down-matrix, or a transposed up-matrix.
        ridge: what is added before inverting, relative to the mean eigenvalue; 0 for nothing.
    """
    wide = factor.to(_widest(factor))
    matrix = wide @ wide.mT
    values, vectors = torch.linalg.eigh(matrix)
    trace = values.sum(-1, keepdim=True)
    added = (ridge * trace / values.shape[-1]).clamp_min(_FLOOR) if ridge else 0.0
    there = (trace > _FLOOR**2).to(values.dtype)
    inverted = there / torch.where(there > 0, values + added, 1.0)
    return Gram(matrix, values, vectors, (vectors * inverted[..., None, :]) @ vectors.mT)


def sylvester(left: Gram, right: Gram, matrix: Float[Tensor, "*stack r r"]) -> Tensor:
    """Return X with `left X + X right = matrix`; both are symmetric and not negative."""
    turned = left.vectors.mT @ matrix @ right.vectors
    sums = left.values[..., :, None] + right.values[..., None, :]
    largest = sums.amax((-2, -1), keepdim=True)
    # Where both eigenvalues vanish the right side has nothing either, and any X will do.
    lost = sums <= torch.finfo(sums.dtype).eps * largest
    return left.vectors @ (turned / sums.masked_fill(lost, torch.inf)) @ right.vectors.mT


@dataclass(frozen=True)
class Pair:
    """A factor pair (or a stack of pairs of one shape) at one moment, ready to project with."""

    up: Float[Tensor, "*stack m r"]
    down: Float[Tensor, "*stack r n"]
    scale: float
    gram_up: Gram
    gram_down: Gram

    @classmethod
    @torch.no_grad()
    def of(cls, up: Tensor, down: Tensor, scale: float, ridge: float = 1e-6) -> "Pair":
        """Return the pair with its Gram matrices.

        Args:
            up: B.
            down: A.
            scale: s, not zero.
            ridge: see `gram`.
        """
        return cls(up, down, scale, gram(up.mT, ridge), gram(down, ridge))

    def with_down_held(self) -> "Pair":
        """Return the pair as if B were zero in the projection: only B moves, `E = g P_A`."""
        zero = torch.zeros_like(self.gram_up.inverse)
        return Pair(
            self.up, self.down, self.scale, self.gram_up._replace(inverse=zero), self.gram_down
        )

    @torch.no_grad()
    def optimal(
        self,
        grad_up: Float[Tensor, "*stack m r"],
        grad_down: Float[Tensor, "*stack r n"],
        choice: Choice = "sylvester",
    ) -> tuple[Float[Tensor, "*stack m r"], Float[Tensor, "*stack r n"]]:
        """Return `(GB, GA)` from `(gB, gA)`."""
        into_up, into_down = self.gram_up.inverse, self.gram_down.inverse
        wide = into_up.dtype
        weight = self.scale**-2
        mix = self._mix((grad_down @ self.down.mT).to(wide), choice)
        shared = weight * into_up @ (self.up.mT @ grad_up).to(wide) @ into_down
        if mix is not None:
            shared = shared + mix
        kind = self.up.dtype
        new_up = grad_up @ (weight * into_down).to(kind) - self.up @ shared.to(kind)
        new_down = (weight * into_up).to(kind) @ grad_down
        if mix is not None:
            new_down = new_down + mix.to(kind) @ self.down
        return new_up, new_down

    def equivalent(
        self, new_up: Float[Tensor, "*stack m r"], new_down: Float[Tensor, "*stack r n"]
    ) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack k n"]]:
        """Return E as a pair of rank 2 r: `E = left @ right`."""
        left = torch.cat([self.up, new_up], -1)
        return left, self.scale * torch.cat([new_down, self.down], -2)

    def _mix(self, cross: Float[Tensor, "*stack r r"], choice: Choice) -> Tensor | None:
        """Return X for `cross = gA A^T`, or None for zero."""
        if choice == "zero":
            return None
        part = -(self.scale**-2) * self.gram_up.inverse @ cross
        if choice == "symmetric":
            return 0.5 * part @ self.gram_down.inverse
        return sylvester(self.gram_up, self.gram_down, part)


def _widest(tensor: Tensor) -> torch.dtype:
    """Return float64, or float32 on a device that lacks it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
