"""Which Deltas a dynamics trains, and that it can."""

from collections.abc import Collection

from torch import nn

from visionlora.dynamics.config import DynamicsConfig
from visionlora.errors import ConfigError
from visionlora.ranks.structure import Place, places_of


def trained_places(model: nn.Module) -> list[Place]:
    """Return the places of active adapters that train, in module order."""
    return [
        place
        for place in places_of(model)
        if place.active and any(item.requires_grad for item in place.delta.parameters())
    ]


def check_places(config: DynamicsConfig, places: Collection[Place]) -> None:
    """Refuse a model without adapters that train, or with one that the dynamics cannot train.

    Raises:
        ConfigError: with the reason.
    """
    if not places:
        raise ConfigError(f"{config.name} has nothing to do: no active adapter of the model trains")
    for method in dict.fromkeys(place.delta.config for place in places):
        if config.forms is not None and method.form not in config.forms:
            raise ConfigError(f"{config.name} cannot train {method.method}: {config.why}")
        config.check(method, ())
