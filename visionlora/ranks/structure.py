"""Which Deltas a model has, with which shapes: read it, change it, take it back from a checkpoint.

A Delta's shapes follow from its configuration, so a structure is a configuration per site. A Delta
of another rank is a new one, built as `inject` builds it, in the place of the old one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from visionlora.build import build_delta, build_shared
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.hosts import Host, release
from visionlora.methods.base import Delta, Shared
from visionlora.record import SharedStates, hosts_of
from visionlora.registry import build_config
from visionlora.sites import Site


@dataclass(frozen=True, eq=False)
class Place:
    """Where one Delta is."""

    path: str
    """Dotted name of the layer in the model that is looked at."""
    host: Host
    adapter: str
    key: str

    @property
    def name(self) -> str:
        """Path and key, unique among the sites of an adapter."""
        return f"{self.path}.{self.key}" if self.path else self.key

    @property
    def site(self) -> Site:
        """The site, named as it was when the adapter was injected."""
        return self.host.state.sites[self.adapter][self.key]

    @property
    def delta(self) -> Delta:
        """The Delta that is there now."""
        return cast(Delta, self._group[self.key])

    @property
    def active(self) -> bool:
        """Whether the adapter applies."""
        return self.adapter in self.host.state.active

    @property
    def _group(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.host.adapters[self.adapter])

    def build(self, config: AdapterConfig, shared: Shared | None = None) -> Delta:
        """Return a Delta for this site with its initial values, without putting it there."""
        made = build_delta(cast(nn.Module, self.host), self.site, config, shared)
        return made.train(self.delta.training)

    def put(self, delta: Delta) -> None:
        """Replace the Delta."""
        self._group[self.key] = delta
        self.host.refresh()

    def remove(self) -> None:
        """Take the site out of its adapter; a layer without any other is a plain one again."""
        state = self.host.state
        del self._group[self.key], state.sites[self.adapter][self.key]
        if not len(self._group):
            del self.host.adapters[self.adapter]
            del state.sites[self.adapter], state.strengths[self.adapter]
            state.active = tuple(name for name in state.active if name != self.adapter)
        if len(self.host.adapters):
            self.host.refresh()
        else:
            release(cast(nn.Module, self.host))


def places_of(model: nn.Module, adapter: str | None = None) -> list[Place]:
    """Return all places of one adapter, or of all, in module order."""
    return [
        Place(path, host, name, key)
        for path, host in hosts_of(model).items()
        for name, group in host.adapters.items()
        if adapter in (None, name)
        for key in cast(nn.ModuleDict, group)
    ]


def replace_shared(model: nn.Module, old: Shared, new: Shared) -> None:
    """Put a Shared in the place of another; the Deltas that use it are the caller's."""
    for states in model.modules():
        if isinstance(states, SharedStates):
            for name, item in list(states.items()):
                if item is old:
                    states[name] = new


def structure_of(model: nn.Module) -> list[list[Any]]:
    """Return `[path, adapter, key, configuration]` of every site, as plain values."""
    return [
        [place.path, place.adapter, place.key, place.delta.config.to_dict()]
        for place in places_of(model)
    ]


def build_config_from(options: dict[str, Any]) -> AdapterConfig:
    """Return the configuration whose `to_dict` this is."""
    values = {name: value for name, value in options.items() if name != "method"}
    return build_config(options["method"], values)


@dataclass
class Renewal:
    """Deltas and Shared of a saved structure, built but not yet part of the model."""

    model: nn.Module
    deltas: list[tuple[Place, Delta]] = field(default_factory=list)
    shared: list[tuple[Shared, Shared]] = field(default_factory=list)
    removed: list[Place] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.deltas or self.shared or self.removed)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the named parameters that the model will have."""
        gone: list[nn.Module] = [place.delta for place, _ in self.deltas]
        gone += [place.delta for place in self.removed]
        new: dict[int, nn.Module] = {id(place.delta): delta for place, delta in self.deltas}
        new |= {id(old): shared for old, shared in self.shared}
        ids = {id(module) for module in gone} | {id(old) for old, _ in self.shared}
        lost = {id(p) for m in self.model.modules() if id(m) in ids for p in m.parameters()}
        result = {n: p for n, p in self.model.named_parameters() if id(p) not in lost}
        for prefix, module in self.model.named_modules():
            if id(module) in new:
                result |= dict(new[id(module)].named_parameters(prefix))
        return result

    def apply(self) -> None:
        """Make them part of the model."""
        for place in self.removed:
            place.remove()
        for old, new in self.shared:
            replace_shared(self.model, old, new)
        for place, delta in self.deltas:
            place.put(delta)


def prepare(model: nn.Module, saved: Iterable[list[Any]]) -> Renewal:
    """Build what a saved structure has differently, without touching the model.

    Raises:
        ConfigError: the structure has a site that the model lacks.
    """
    here = {(place.path, place.adapter, place.key): place for place in places_of(model)}
    there: dict[tuple[str, str, str], AdapterConfig] = {}
    for path, adapter, key, options in saved:
        if (path, adapter, key) not in here:
            raise ConfigError(
                f"the checkpoint has adapter {adapter!r} at {path}.{key}: it is of another model"
            )
        there[path, adapter, key] = build_config_from(options)
    changed = {
        place.adapter
        for place_key, place in here.items()
        if place_key not in there or there[place_key] != place.delta.config
    }
    renewal = Renewal(model, removed=[here[key] for key in here if key not in there])
    for adapter in sorted(changed):
        plan = [(here[key], there[key]) for key in there if key[1] == adapter]
        old = next((place.delta.shared[0] for place, _ in plan if place.delta.shared), None)
        shared = None
        if old is not None:
            shared = build_shared_like(plan)
            assert shared is not None
            renewal.shared.append((old, shared))
        for place, config in plan:
            if old is not None or config != place.delta.config:
                renewal.deltas.append((place, place.build(config, shared)))
    return renewal


def build_shared_like(plan: list[tuple[Place, AdapterConfig]]) -> Shared | None:
    """Build the model-level state for configurations of places, on their device and in their type.

    Returns:
        None if the method has no such state.
    """
    first = plan[0][0]
    return build_shared(
        cast(nn.Module, first.host), [(place.site, config) for place, config in plan]
    )
