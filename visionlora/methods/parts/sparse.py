"""Entries of a matrix that are trained one by one: which are dropped and grown, and two rules.

All functions work in place on tensors of one length k (or rows and columns of the matrix), so that
an optimiser, a checkpoint or a wrapper that holds a tensor goes on holding it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Grown(NamedTuple):
    """What a selection did."""

    slots: Int[Tensor, " d"]
    """Places in the list of entries that have a new index."""
    picked: Int[Tensor, " d"]
    """Which candidate each of them has become."""


@torch.no_grad()
def regrow(
    index: Int[Tensor, " k"],
    values: Float[Tensor, " k"],
    candidates: Int[Tensor, " c"],
    scores: Float[Tensor, " c"],
    count: int,
    size: int,
) -> Grown:
    """Drop the `count` smallest values and grow the candidates with the largest scores instead.

    An entry that is dropped and grown at once stays as it is; of the others the index is replaced
    and the value set to zero. Fewer candidates than that leave the rest undropped.

    Args:
        index: flat position of every entry, each at most once.
        values: value of every entry.
        candidates: flat positions that may be grown, each at most once.
        scores: how much each is wanted.
        count: how many entries are dropped.
        size: number of positions.
    """
    dropped = torch.zeros_like(index, dtype=torch.bool)
    dropped[values.abs().argsort(stable=True)[:count]] = True
    held = torch.zeros(size, dtype=torch.bool, device=index.device)
    held[index[~dropped].long()] = True
    wanted = scores.masked_fill(held[candidates.long()], -1.0)
    picked = wanted.argsort(descending=True, stable=True)[: int(dropped.sum())]
    picked = picked[wanted[picked] >= 0]
    # What is dropped and grown at once keeps its slot.
    slot_of = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    slot_of[index.long()] = torch.arange(len(index), device=index.device)
    at = slot_of[candidates[picked].long()]
    dropped[at[at >= 0]] = False
    picked = picked[at < 0]
    slots = dropped.nonzero().flatten()
    slots = slots[values[slots].abs().argsort(stable=True)][: len(picked)]
    index[slots] = candidates[picked].to(index.dtype)
    values[slots] = 0.0
    return Grown(slots, picked)


@torch.no_grad()
def adam_step(
    values: Float[Tensor, " k"],
    gradient: Float[Tensor, " k"],
    mean: Float[Tensor, " k"],
    square: Float[Tensor, " k"],
    age: Float[Tensor, " k"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW with an age per entry: every entry is corrected for its own history.

    With equal ages this is torch's AdamW.
    """
    gradient = gradient.to(mean.dtype)
    age += 1
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    first, second = (1 - beta**age for beta in betas)
    step = (mean / first) / ((square / second).sqrt_().add_(eps))
    values.mul_(1 - lr * weight_decay).sub_((lr * step).to(values.dtype))


@torch.no_grad()
def sm3_step(
    values: Float[Tensor, " k"],
    gradient: Float[Tensor, " k"],
    index: Int[Tensor, " k"],
    row: Float[Tensor, " out"],
    column: Float[Tensor, " in"],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of SM3 (Anil et al. 2019, arXiv 1901.11150) on a sparse matrix, without momentum.

    An entry's sum of squared gradients is bounded by the smaller one of its row's and its column's
    accumulator, which keep the largest such bound.
    """
    gradient = gradient.to(row.dtype)
    flat = index.long()
    i, j = flat // len(column), flat % len(column)
    bound = torch.minimum(row[i], column[j]).addcmul_(gradient, gradient)
    row.scatter_reduce_(0, i, bound, "amax")
    column.scatter_reduce_(0, j, bound, "amax")
    step = gradient * (bound + _TINY).rsqrt_()
    values.mul_(1 - lr * weight_decay).sub_((lr * step).to(values.dtype))


_TINY = 1e-30
"""Keeps the step of an entry that never had a gradient at zero."""
