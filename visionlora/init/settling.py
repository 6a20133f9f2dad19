r"""Whether the principal components of all inputs have stopped turning (EVA's stopping rule).

After every batch, of every input's scatter S (`visionlora.init.inputs`):

    V <- eigenvectors of S in the span of S S V,   settled: |cos(v_i, v_i before)| >= tau, i <= r

Two steps of subspace iteration from the last batch's V cost 2 in^2 r multiply-adds instead of the
in^3 of a decomposition (derived); what has not converged counts as not settled.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.init.inputs import Moments
from visionlora.sites import named_generator

_SPARE = 4
"""Columns beyond r that speed up convergence."""


class Settling:
    """Asks after every batch.

    Args:
        watched: moments with the number of components that have to settle.
        tau: smallest cosine between successive components.
    """

    def __init__(self, watched: Sequence[tuple[Moments, int]], tau: float) -> None:
        self._watched = list(watched)
        self._tau = tau
        generator = named_generator(0, "settling")
        self._last = [
            torch.linalg.qr(
                torch.empty(
                    len(moments.mean), min(count + _SPARE, len(moments.mean)), dtype=torch.float64
                ).normal_(generator=generator)
            ).Q
            for moments, count in self._watched
        ]

    def settled(self) -> bool:
        """Take in the moments as they are now, and tell whether all components have settled."""
        steady = True
        for index, (moments, count) in enumerate(self._watched):
            last = self._last[index]
            now = _advance(moments.scatter.double(), last)
            cosines = (now * last).sum(0)[:count].abs()
            steady = bool((cosines >= self._tau).all()) and steady
            self._last[index] = now
        return steady


def _advance(scatter: Float[Tensor, "in in"], basis: Float[Tensor, "in k"]) -> Tensor:
    """Return the Ritz vectors, the strongest first, after two steps of subspace iteration."""
    for _ in range(2):
        basis = torch.linalg.qr(scatter @ basis).Q
    inner = basis.t() @ scatter @ basis
    return basis @ torch.linalg.eigh((inner + inner.t()) / 2).eigenvectors.flip(1)
