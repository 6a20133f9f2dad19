"""What an initialiser is given for one site, made by hand."""

import torch

from visionlora.init.base import Given, SiteStats
from visionlora.sites import Site, named_generator


def matrix(*shape, seed=0):
    """Return float64 normals from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def given(
    shape=(12, 10),
    rank=3,
    form="pair",
    *,
    weight=None,
    gradient=None,
    scale=1.5,
    arms=1,
    kind="linear",
    seed=0,
):
    """Return one site with a random weight, and its gradient if there is one."""
    weight = matrix(*shape, seed=1) if weight is None else weight
    return Given(
        site=Site("layer", "weight", kind, *weight.shape),
        form=form,
        weight=weight,
        rank=rank,
        scale=scale,
        generator=named_generator(seed, "layer.weight"),
        stats=SiteStats(gradient=gradient),
        arms=arms,
    )


def product(start):
    """Return the product of a start's factors."""
    return start.up @ start.down if start.core is None else start.up @ start.core @ start.down


def best(g, rank):
    """Return the best approximation of a matrix of some rank, by a full SVD."""
    U, S, V = torch.linalg.svd(g, full_matrices=False)
    return U[:, :rank] * S[:rank] @ V[:rank]
