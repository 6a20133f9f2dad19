"""The end of rank allocation: every site becomes plain LoRA of the rank that it was given."""

from typing import Any

import torch
from torch import nn

from visionlora.build import refuse_merged
from visionlora.config import AdapterConfig
from visionlora.errors import AdapterStateError
from visionlora.methods.base import Delta
from visionlora.methods.parts.noise import without_noise
from visionlora.ranks.structure import Place, places_of
from visionlora.registry import build_config


def finalize(model: nn.Module) -> nn.Module:
    """Take out the ranks that are masked or in reserve, so that what is saved is what is used.

    A site of a rank-allocating method becomes plain LoRA with the ranks that are left and the same
    scale; a site with none left is taken out of the adapter. Everything else stays as it is, and a
    second call changes nothing. `training.fit` calls it at the end. Parameters are new ones, which
    an optimiser of before does not know.

    Raises:
        AdapterStateError: the model is merged, or an adapter has no rank left anywhere.
    """
    refuse_merged(model, "finalize")
    found = [(place, place.delta.kept()) for place in places_of(model)]
    left = {
        place.adapter: any(kept is None or bool(kept.any()) for other, kept in found
                           if other.adapter == place.adapter)
        for place, _ in found
    }  # fmt: skip
    for adapter, any_left in left.items():
        if not any_left:
            raise AdapterStateError(
                f"adapter {adapter!r} has no rank left at any of its sites: every one was masked "
                "in training; lower the pressure (threshold, budget) or train longer"
            )
    for place, kept in found:
        settled = place.delta.settled(place.build) if kept is None else None
        if kept is not None:
            _settle(place, kept)
        elif settled is not None:
            place.put(settled)
    return model


@torch.no_grad()
def _settle(place: Place, kept: torch.Tensor) -> None:
    """Replace a Delta by plain LoRA, or take its site out."""
    old, rank = place.delta, int(kept.sum())
    if not rank:
        place.remove()
        return
    with without_noise(old):
        factors = old.factors()
    assert factors is not None
    up, down = factors
    new = place.build(plain_config(old, rank))
    new.get_parameter("B").copy_(up[:, kept])
    new.get_parameter("A").copy_(down[kept])
    for parameter in new.parameters():
        parameter.requires_grad_(any(item.requires_grad for item in old.parameters()))
    place.put(new)


def plain_config(delta: Delta, rank: int) -> AdapterConfig:
    """Return the configuration of plain LoRA with the scale of a Delta."""
    options: dict[str, Any] = {"seed": delta.config.seed, "dropout": delta.dropout}
    return build_config("lora", {"rank": rank, "alpha": delta.scale * rank, **options})
