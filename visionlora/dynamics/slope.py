r"""Where a change is going: row norms of it, and of the step that one unit of descent would take.

    G = d Delta W / d t * dL / dt,   t all trained tensors of a site

For a pair, G = s (B gA + gB A); with a middle factor N also s B gN A, with a core R alone s B gR A,
and so on: the product rule for whatever the pair `(U, D)` is made of, so `G = s [dU U] [D; dD]`, of
twice the rank, whose rows are measured from Gram matrices without forming it. For whole matrices
and single entries G is the gradient itself. G is not the gradient g of the weight: a pair has only
`G = s^2 (B B^T g + g A^T A)`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.methods.base import Delta
from visionlora.methods.parts.pair import PairDelta
from visionlora.ops import row_norms

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def change_and_gradient(
    delta: Delta, gradients: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Return the row norms of the change and of G, the derivative of the change along gradients.

    Args:
        delta: a Delta of one of the forms that GGPO serves.
        gradients: of its parameters, by name; a missing one counts as zero.
    """
    own: Any = delta
    if delta.config.form == "full":
        slope = gradients.get("D", torch.zeros_like(own.D))
        return own.D.norm(dim=1), slope.norm(dim=1)
    if delta.config.form == "sparse":
        squares = torch.stack([own.values, gradients["values"]]).square()
        rows = own.index.long() // own.shape[1]
        sums = squares.new_zeros(2, own.shape[0]).index_add_(1, rows, squares)
        return sums[0].sqrt(), sums[1].sqrt()
    (up, down), (up_slope, down_slope) = _pair_and_slope(delta, gradients)
    s, fold = abs(delta.scale), delta.fold
    left, right = torch.cat([up_slope, up], 1), torch.cat([down, down_slope])
    return s * row_norms(up, down, fold), s * row_norms(left, right, fold)


def _pair_and_slope(delta: Delta, gradients: Mapping[str, Tensor]) -> tuple[Pair, Pair]:
    """Return the pair of a Delta and its derivative along gradients of what it is made of."""
    part = _Pair(delta)
    tensors = {name: p.detach() for name, p in delta.named_parameters() if p.requires_grad}

    def pair(*values: Tensor) -> Pair:
        bound = {f"delta.{name}": item for name, item in zip(tensors, values, strict=True)}
        found: Pair = torch.func.functional_call(part, bound, ())
        return found

    along = tuple(gradients.get(name, torch.zeros_like(item)) for name, item in tensors.items())
    # By two backwards: torch's forward mode takes seconds to load, and warns.
    found: tuple[Pair, Pair] = torch.autograd.functional.jvp(pair, tuple(tensors.values()), along)
    return found


class _Pair(nn.Module):
    """The factor pair of a Delta; of DoRA the one inside its norm."""

    delta: Delta

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self) -> Pair:
        delta = self.delta
        pair = delta.inner_pair() if isinstance(delta, PairDelta) else delta.factors()
        assert pair is not None
        return pair
