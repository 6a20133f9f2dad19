"""Typed configurations of the methods, and their validation.

Every method has one frozen keyword-only dataclass derived from `AdapterConfig`; methods that train
a factor pair derive from `LowRankConfig`. `check_fields` turns a wrong type or value into one line.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from visionlora.errors import ConfigError
from visionlora.sites import Site

Form = Literal[
    "pair", "rescaled", "blocks", "middle", "core", "frozen-down", "sparse", "full", "other"
]
"""What kind of algebra a method has, by which initialisers and dynamics know what they can serve:
`s B A`; a pair inside a row norm; several up-matrices; `s B N A`; `s B R A` between frozen bases;
a trained B on a frozen A; scattered entries; the whole matrix; something else."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Options that every method has."""

    method: ClassVar[str] = ""
    """Registered name, set by the subclass."""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    """Kinds of site that the method can serve."""
    form: ClassVar[Form] = "other"
    """What kind of algebra the method has."""

    seed: int = 0
    """Seed of every random tensor of the adapter; combined with the site's name."""

    def __post_init__(self) -> None:
        """Check the types of all fields, and the ranges of those that many methods have."""
        check_fields(self)
        rank, dropout = getattr(self, "rank", None), getattr(self, "dropout", 0.0)
        if rank is not None and rank < 1:
            optional = " or None" if getattr(type(self), "rank", 1) is None else ""
            raise ConfigError(f"{self.method}: rank must be at least 1{optional}, got {rank}")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"{self.method}: dropout must lie in [0, 1), got {dropout}")

    def check_kind(self, site: Site) -> None:
        """Refuse a kind of layer that the method does not serve."""
        if site.kind not in self.kinds:
            raise ConfigError(
                f"{self.method} cannot serve {site.name or 'the layer'}, a {site.kind} layer; it "
                f"serves {', '.join(sorted(self.kinds))}"
            )

    def check_site(self, site: Site) -> None:
        """Raise `ConfigError` if this configuration cannot serve `site`."""

    def check_plan(self, sites: list[Site]) -> None:
        """Raise `ConfigError` if this configuration cannot serve all of `sites` together."""

    def meaning(self) -> dict[str, Any]:
        """Return the options without which trained values are another function.

        What only matters before or during training is left out.
        """
        return {k: v for k, v in self.to_dict().items() if k not in ("seed", "dropout", "init")}

    def to_dict(self) -> dict[str, Any]:
        """Return method name and options as plain values."""
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    r"""Options of methods of the form `Delta W = s * B A`."""

    rank: int = 8
    """Inner dimension r of the factor pair."""
    alpha: float | None = None
    """Numerator of the scale; None means `rank`, so that the standard scale is 1."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: s = alpha / r. `rslora`: s = alpha / sqrt(r) (2023, arXiv 2312.03732)."""
    dropout: float = 0.0
    """Probability of dropping an input entry of the adapter branch while training."""

    @property
    def scale(self) -> float:
        """The factor s in front of `B A`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha) / (self.rank if self.scaling == "standard" else self.rank**0.5)

    def meaning(self) -> dict[str, Any]:
        """Return the options, with the scale in place of the options that make it up."""
        options = super().meaning()
        del options["alpha"], options["scaling"]
        return {**options, "scale": self.scale}

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the site cannot have."""
        check_rank(self.method, self.rank, site)


def check_rank(method: str, rank: int, site: Site) -> None:
    """Refuse a rank that a site cannot have.

    Raises:
        ConfigError: naming the layer, its view and the largest rank.
    """
    if rank > site.max_rank:
        raise ConfigError(
            f"{method}: rank {rank} is larger than {site.name or 'the layer'} allows: its view is "
            f"{site.out_features} x {site.in_features}, so at most {site.max_rank}"
        )


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """
    hints = _hints(cast(Hashable, type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            named = getattr(config, "method", "") or getattr(config, "name", "")
            allowed = _describe(hints[field.name])
            raise ConfigError(
                f"{named or type(config).__name__}: {field.name} must be {allowed}, got {value!r}"
            )


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        parts = typing.get_args(hint)
        if parts[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
        return (
            isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
        )
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(item) for item in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    return {"NoneType": "None", "int": "a whole number", "float": "a finite number"}.get(
        getattr(hint, "__name__", ""), str(getattr(hint, "__name__", hint))
    )
