"""A method x an initialiser x training dynamics on one line, checked before any compute.

    block-lora+lora-ga(gamma=64)+glad(rho=0.1)

The first name is a method or a preset; every other one is an initialiser or a dynamics, in any
order. A name that stands alone is a preset (`lora-ga` is `lora+lora-ga`). Options follow a name in
parentheses; those of the method may be given apart. Which products make sense is declared by each
initialiser and dynamics (`forms`, `check`, `looks_twice`), and every refusal says why.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from visionlora.config import AdapterConfig
from visionlora.dynamics.base import Dynamics
from visionlora.dynamics.config import DynamicsConfig
from visionlora.errors import ConfigError, nearest
from visionlora.init.base import Initialiser
from visionlora.init.suitable import check_form
from visionlora.registry import (
    build_config,
    build_dynamics,
    build_initialiser,
    get_method,
    get_preset,
    list_dynamics,
    list_initialisers,
    list_methods,
    list_presets,
)


@dataclass(frozen=True)
class Recipe:
    """A checked product."""

    text: str
    """As it was written."""
    method: str
    """Registered method."""
    options: Mapping[str, Any]
    """Options of the method that the text, the preset or a factor sets."""
    implied: Mapping[str, Any]
    """Options that a factor asks for where nobody says otherwise."""
    init: Initialiser | None
    dynamics: tuple[DynamicsConfig, ...]

    def config(self, **options: Any) -> AdapterConfig:
        """Return the configuration of the method, the product checked with these options.

        Raises:
            ConfigError: an unknown or wrong option, or a product that makes no sense with it.
        """
        kind = get_method(self.method).config
        _check_forms(kind, self.dynamics)  # before options that another form would not have
        fields = kind.__dataclass_fields__
        implied = {key: value for key, value in self.implied.items() if key in fields}
        config = build_config(self.method, {**implied, **self.options, **options})
        if getattr(config, "offset", 0):
            raise ConfigError(
                f"{self.method}: offset is set by initialisers and restarts, not by hand"
            )
        check_product(config, self.init, self.dynamics)
        return config

    def build_dynamics(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
    ) -> list[Dynamics]:
        """Return the dynamics of one run, for `training.fit` or a `Stepper`.

        Those that freeze a part of the parameters come last, when the others have found theirs.
        """
        ordered = sorted(self.dynamics, key=lambda item: item.freezes)
        return [item.build(model, optimizer, steps) for item in ordered]

    @property
    def factors(self) -> list[str]:
        """Method, initialiser and dynamics, with the options of the latter two."""
        init = [] if self.init is None else [self.init.describe()]
        return [self.method, *init, *(item.describe() for item in self.dynamics)]


def parse(text: str) -> Recipe:
    """Read a product and check it.

    Args:
        text: `method+initialiser+dynamics`, or a method or a preset.

    Raises:
        ConfigError: an unknown name, a malformed option, or a product that makes no sense.
    """
    parts = [_read_part(part, text) for part in _split(text)]
    (first, options), *others = parts
    preset = get_preset(first)
    init: Initialiser | None = None
    dynamics: list[DynamicsConfig] = []
    method = first
    pending = list(others)
    chosen: dict[str, Any] = {}
    if preset is not None:
        method, chosen = preset.method, dict(preset.options)
        own = {**options}
        for name in preset.factors:  # options in parentheses are those of the factor, if it has one
            fields = _factor(name, text).__dataclass_fields__
            mine = {key: own.pop(key) for key in list(own) if key in fields}
            pending.insert(len(pending) - len(others), (name, mine))
        options = own
    elif first not in list_methods():
        _unknown(first, text)
    chosen |= options
    for name, values in pending:
        if name in list_initialisers():
            if init is not None:
                raise ConfigError(
                    f"{text}: two initialisers, {init.name} and {name}; leave one out"
                )
            init = build_initialiser(name, values)
        elif name in list_dynamics():
            if any(item.name == name for item in dynamics):
                raise ConfigError(f"{text}: {name} is there twice")
            dynamics.append(build_dynamics(name, values))
        else:
            _unknown_factor(name, text)
    implied: dict[str, Any] = {}
    if init is not None:
        implied |= init.implies
    for item in dynamics:
        implied |= item.implies
    recipe = Recipe(
        text,
        method,
        MappingProxyType(chosen),
        MappingProxyType(implied),
        init,
        tuple(dynamics),
    )
    recipe.config()
    return recipe


def check_product(
    config: AdapterConfig, init: Initialiser | None, dynamics: tuple[DynamicsConfig, ...]
) -> None:
    """Refuse a product that makes no sense.

    Raises:
        ConfigError: with the reason.
    """
    if init is not None:
        check_form(init, config)
    twice = [item.name for item in dynamics if item.looks_twice]
    if len(twice) > 1:
        raise ConfigError(
            f"{' and '.join(twice)} both move the parameters for a second look at the loss, and "
            "neither would see the point that it asks for; leave one out"
        )
    _check_forms(type(config), dynamics)
    for item in dynamics:
        item.check(config, [other for other in dynamics if other is not item])


def _check_forms(kind: type[AdapterConfig], dynamics: tuple[DynamicsConfig, ...]) -> None:
    """Refuse dynamics that cannot train a method."""
    for item in dynamics:
        if item.forms is not None and kind.form not in item.forms:
            raise ConfigError(f"{item.name} cannot train {kind.method}: {item.why}")


def _split(text: str) -> list[str]:
    """Split at the plus signs outside of parentheses; `lora+` keeps its own."""
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("a method is a name, or a product such as 'block-lora+lora-ga+glad'")
    parts = re.split(r"\+(?![^(]*\))", text.replace(" ", ""))
    joined: list[str] = []
    for part in parts:
        if part.startswith("(") and joined:
            joined[-1] += f"+{part}"  # options of a name that ends with a plus
        elif part:
            joined.append(part)
        elif joined and not joined[-1].endswith("+"):
            joined[-1] += "+"
        else:
            raise ConfigError(f"{text!r}: a name is missing beside a plus sign")
    return joined


def _read_part(part: str, text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of `name(key=value, ...)`."""
    found = re.fullmatch(r"([\w.+-]+)(?:\((.*)\))?", part)
    if found is None:
        raise ConfigError(f"{text!r}: {part!r} is not a name with options in parentheses")
    name, inside = found[1], found[2]
    if not inside:
        return name, {}
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        options = {str(item.arg): _literal(item.value) for item in call.keywords if item.arg}
        if call.args or len(options) != len(call.keywords):  # no name, or one twice
            raise ValueError
        return name, options
    except (SyntaxError, ValueError):
        raise ConfigError(
            f"{text!r}: the options of {name} must read key=value, as in glad(rho=0.1)"
        ) from None


def _literal(node: ast.expr) -> Any:
    """Return a literal; a bare word is a text, and true, false and null are themselves."""
    if isinstance(node, ast.Name):
        words = {"true": True, "false": False, "null": None, "none": None}
        return words.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def _factor(name: str, text: str) -> type[Initialiser] | type[DynamicsConfig]:
    found = list_initialisers().get(name) or list_dynamics().get(name)
    if found is None:
        _unknown_factor(name, text)
    return found  # type: ignore[return-value]


def _unknown(name: str, text: str) -> None:
    known = [*list_methods(), *(preset.name for preset in list_presets())]
    if name in list_initialisers() or name in list_dynamics():
        using = [preset.name for preset in list_presets() if name in preset.factors]
        raise ConfigError(
            f"{text!r} must begin with a method, and {name} is none: write "
            f"{using[0] if using else f'{_first_method(name)}+{name}'}"
        )
    hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}"
    raise ConfigError(f"unknown method {name!r}{hint}")


def _unknown_factor(name: str, text: str) -> None:
    known = [*list_initialisers(), *list_dynamics()]
    if name in list_methods() or get_preset(name) is not None:
        raise ConfigError(f"{text!r} has two methods; {name} must stand alone or come first")
    hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}"
    raise ConfigError(f"{text!r}: {name!r} is neither an initialiser nor a dynamics{hint}")


def _first_method(factor: str) -> str:
    """Return a method that an initialiser or a dynamics without a preset goes with."""
    forms = _factor(factor, factor).forms
    methods = ["lora", *list_methods()]
    return next(m for m in methods if forms is None or get_method(m).config.form in forms)
