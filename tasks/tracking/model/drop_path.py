"""Stochastic depth, the same rate in every block: which samples a residual branch sees in training.

    rate p <= 0.1    y = x + m / (1 - p) * f(x),  m ~ Bernoulli(1 - p) per sample
    rate p > 0.1     y = x,  y[S] += B / |S| * f(x[S])

(Huang et al. 2016, 1603.09382.) Above 0.1 the branch runs on a random subset S of max(1, floor(B
(1 - p))) of the B samples alone, as DINOv2 trains (Oquab et al. 2023, 2304.07193): the expectation
is that of the first line, and the skipped samples cost neither time nor memory.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from timm.layers.drop import drop_path
from torch import Tensor

SUBSET_ABOVE = 0.1
"""Rates above this run the branch on a subset of the batch."""


def residual(
    x: Float[Tensor, "batch tokens width"],
    branch: Callable[[Tensor], Tensor],
    rate: float = 0.0,
) -> Float[Tensor, "batch tokens width"]:
    """Return `x + branch(x)`, with stochastic depth where `rate` is positive."""
    if rate <= 0.0:
        return x + branch(x)
    if rate <= SUBSET_ABOVE:
        return x + drop_path(branch(x), rate, training=True)
    batch = len(x)
    kept = max(int(batch * (1 - rate)), 1)
    chosen = torch.randperm(batch, device=x.device)[:kept]
    change = branch(x[chosen])
    return x.index_add(0, chosen, change.to(x.dtype), alpha=batch / kept)
