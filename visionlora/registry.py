"""The registry: methods and presets by name.

Tasks, tests, benchmarks and docs know methods only through `get_method` and `list_methods`, so a
new file under `methods/` that calls `register` appears everywhere without another edit.
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
    """A named method with options already set."""

    name: str
    method: str
    options: Mapping[str, Any]
    summary: str


_METHODS: dict[str, Method] = {}
_PRESETS: dict[str, Preset] = {}


def register(
    config: type[AdapterConfig],
    delta: "type[Delta]",
    shared: "type[Shared] | None" = None,
    controller: "type[Controller] | None" = None,
) -> None:
    """Add a method under `config.method`."""
    _METHODS[config.method] = Method(config.method, config, delta, shared, controller)


def register_preset(name: str, method: str, summary: str, **options: Any) -> None:
    """Add `name` as `method` with `options`."""
    _PRESETS[name] = Preset(name, method, MappingProxyType(options), summary)


def list_methods(pattern: str = "*") -> list[str]:
    """Return the sorted names of the methods that match a glob."""
    return sorted(name for name in _METHODS if fnmatch.fnmatchcase(name, pattern))


def list_presets() -> list[Preset]:
    """Return all presets, sorted by name."""
    return [_PRESETS[name] for name in sorted(_PRESETS)]


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
    known = [field.name for field in dataclasses.fields(config)]
    values = {**(_PRESETS[method].options if method in _PRESETS else {}), **(options or {})}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{method} has no option {key!r}{nearest(key, known)}; its options are "
                f"{', '.join(known)}"
            )
    return config(**values)
