"""The registry: methods, initialisers, dynamics and presets by name.

Tasks, tests, benchmarks and docs know them only through this file, so a new file under `methods/`,
`init/` or `dynamics/` that registers itself appears everywhere without another edit.
"""

import dataclasses
import fnmatch
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from visionlora.dynamics.config import DynamicsConfig
    from visionlora.init.base import Initialiser
    from visionlora.methods.base import Delta, Shared
    from visionlora.ranks.controller import Controller


@dataclass(frozen=True)
class Method:
    """A registered parameterisation."""

    name: str
    config: type[AdapterConfig]
    delta: "type[Delta]"
    shared: "type[Shared] | None"
    controller: "type[Controller] | None" = None
    """Training-time policy that `training.fit` adds by itself."""

    @property
    def documentation(self) -> str:
        """The docstring of the method's module: paper, equation, shapes, counts."""
        return inspect.cleandoc(inspect.getmodule(self.delta).__doc__ or "")

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.split("\n", 1)[0]


@dataclass(frozen=True)
class Preset:
    """A named method, perhaps with an initialiser and dynamics, with options already set."""

    name: str
    method: str
    """The method."""
    factors: tuple[str, ...]
    """Names of the initialiser and of the dynamics."""
    options: Mapping[str, Any]
    summary: str


_METHODS: dict[str, Method] = {}
_PRESETS: dict[str, Preset] = {}
_INITIALISERS: "dict[str, type[Initialiser]]" = {}
_DYNAMICS: "dict[str, type[DynamicsConfig]]" = {}


def register(
    config: type[AdapterConfig],
    delta: "type[Delta]",
    shared: "type[Shared] | None" = None,
    controller: "type[Controller] | None" = None,
) -> None:
    """Add a method under `config.method`."""
    _METHODS[config.method] = Method(config.method, config, delta, shared, controller)


def register_preset(name: str, method: str, summary: str, *factors: str, **options: Any) -> None:
    """Add `name` as `method` with `options`, and with an initialiser or dynamics by name."""
    _PRESETS[name] = Preset(name, method, factors, MappingProxyType(options), summary)


def register_initialiser(kind: "type[Initialiser]") -> None:
    """Add an initialiser under `kind.name`."""
    _INITIALISERS[kind.name] = kind


def register_dynamics(kind: "type[DynamicsConfig]") -> None:
    """Add a training dynamics under `kind.name`."""
    _DYNAMICS[kind.name] = kind


def list_methods(pattern: str = "*") -> list[str]:
    """Return the sorted names of the methods that match a glob."""
    return sorted(name for name in _METHODS if fnmatch.fnmatchcase(name, pattern))


def list_presets() -> list[Preset]:
    """Return all presets, sorted by name."""
    return [_PRESETS[name] for name in sorted(_PRESETS)]


def list_initialisers() -> "dict[str, type[Initialiser]]":
    """Return all initialisers by name, sorted."""
    return {name: _INITIALISERS[name] for name in sorted(_INITIALISERS)}


def list_dynamics() -> "dict[str, type[DynamicsConfig]]":
    """Return the options of all dynamics by name, sorted."""
    return {name: _DYNAMICS[name] for name in sorted(_DYNAMICS)}


def get_preset(name: str) -> Preset | None:
    """Return a preset by name, None if there is none."""
    return _PRESETS.get(name)


def build_initialiser(
    init: "str | Initialiser", options: Mapping[str, Any] | None = None
) -> "Initialiser":
    """Return an initialiser with options.

    Raises:
        ConfigError: unknown name, unknown option, or a value of the wrong type or range.
    """
    if not isinstance(init, str):
        if options:
            raise ConfigError(f"options {sorted(options)} must be fields of the initialiser")
        return init
    kind = _find("initialiser", init, _INITIALISERS)
    return kind(**_known_options(init, kind, options or {}))


def build_dynamics(name: str, options: Mapping[str, Any] | None = None) -> "DynamicsConfig":
    """Return the options of a training dynamics.

    Raises:
        ConfigError: unknown name, unknown option, or a value of the wrong type or range.
    """
    kind = _find("dynamics", name, _DYNAMICS)
    return kind(**_known_options(name, kind, options or {}))


def _find(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown {what} {name!r}{hint}")
    return known[name]


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        ConfigError: the name is unknown; the message lists the nearest ones.
    """
    if name in _PRESETS:
        name = _PRESETS[name].method
    if name not in _METHODS:
        known = [*_METHODS, *_PRESETS]
        hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown method {name!r}{hint}")
    return _METHODS[name]


def build_config(method: str, options: Mapping[str, Any] | None = None) -> AdapterConfig:
    """Return the configuration of `method` (or preset) with `options`.

    Raises:
        ConfigError: unknown method, unknown option, or a value of the wrong type or range.
    """
    config = get_method(method).config
    preset = _PRESETS.get(method)
    if preset is not None and preset.factors:
        raise ConfigError(
            f"{method} is {'+'.join([preset.method, *preset.factors])}, more than the "
            f"configuration of a method: see visionlora.parse"
        )
    values = {**(preset.options if preset else {}), **(options or {})}
    return config(**_known_options(method, config, values))


def _known_options(owner: str, kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, if all of them are fields of `kind`."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            its = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"{owner} has no option {key!r}{nearest(key, known)}; {its}")
    return dict(values)
