"""One `Mapping` per method of PEFT: how its tensors become ours, and ours its.

A mapping file calls `register`; reading and writing find it by PEFT's name of the method.
"""

from collections.abc import Callable
from collections.abc import Mapping as Table
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from visionlora.config import AdapterConfig
from visionlora.errors import AdapterFileError
from visionlora.io.known import KnownLayers
from visionlora.io.parts import AdapterParts
from visionlora.io.peft.config import targeted
from visionlora.sites import WHOLE, Kind, Site


@dataclass(frozen=True)
class Source:
    """A PEFT adapter, its tensors sorted by layer."""

    config: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    """`{layer: {short name of the tensor: tensor}}`."""
    shared: dict[str, Tensor]
    """Tensors of the whole model, by short name."""
    known: KnownLayers

    def option(self, name: str, default: Any = None) -> Any:
        """Return an entry of the configuration."""
        value = self.config.get(name)
        return default if value is None else value

    def known_site(self, module: str, kind: Kind = "linear") -> Site:
        """Return the site of a layer whose size the tensors do not tell.

        Raises:
            AdapterFileError: the base model is not known, or has no such layer.
        """
        site = self.known.site(module, WHOLE, kind)
        if site is None:
            raise AdapterFileError(
                f"the size of {module} is not in the file: give the base model, or its state dict "
                "(--base FILE.safetensors)"
            )
        return site

    def ordered(self, kinds: tuple[Kind, ...]) -> list[str] | None:
        """Return the layers that the configuration names, in model order, if it is known."""
        layers = self.known.layers()
        if layers is None:
            return None
        return targeted(self.config, [name for name, kind in layers.items() if kind in kinds])

    def site(
        self,
        module: str,
        out_features: int,
        in_features: int,
        kind: Kind,
        key: str = WHOLE,
        kernel: int = 1,
    ) -> Site:
        """Return the site of a layer, checked against the sizes that the tensors have.

        Raises:
            AdapterFileError: the base model has it in another shape.
        """
        site = self.known.site(module, key, kind)
        if site is None:
            return Site(module, key, kind, out_features, in_features, kernel=kernel)
        if (site.out_features, site.in_features) != (out_features, in_features):
            raise AdapterFileError(
                f"the file is for another model: {site.name} is {site.out_features} x "
                f"{site.in_features} here and {out_features} x {in_features} in the file"
            )
        return site


@dataclass
class Translation:
    """An adapter in our terms: the plan and the tensors of a native file."""

    plan: list[tuple[Site, AdapterConfig]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, site: Site, config: AdapterConfig, tensors: Table[str, Tensor]) -> None:
        """Add a site with its trained tensors, by name."""
        self.plan.append((site, config))
        self.tensors |= {
            f"adapter.{site.name}.{name}": item.contiguous() for name, item in tensors.items()
        }

    def freeze(self, owner: str, tensors: Table[str, Tensor]) -> None:
        """Add frozen tensors of a site, or of the whole model (`shared`)."""
        self.tensors |= {f"frozen.{owner}.{name}": item for name, item in tensors.items()}

    def share(self, tensors: Table[str, Tensor]) -> None:
        """Add trained tensors of the whole model."""
        self.tensors |= {f"shared.{name}": item for name, item in tensors.items()}


@dataclass(frozen=True)
class Written:
    """An adapter in PEFT's terms."""

    config: dict[str, Any]
    layers: Table[str, Table[str, Tensor]]
    """`{layer: {short name of the tensor: tensor}}`."""
    shared: Table[str, Tensor] = field(default_factory=dict)


class Mapping:
    """How one method of PEFT is read and written."""

    kind: ClassVar[str]
    """PEFT's name."""
    methods: ClassVar[tuple[str, ...]] = ()
    """Our methods that are written as this one."""
    also: ClassVar[tuple[str, ...]] = ()
    """Further methods of ours that it may be read as."""
    marks: ClassVar[tuple[str, ...]]
    """Names of its tensors, below a layer or the model."""
    neutral: ClassVar[Table[str, tuple[Any, ...]]] = {}
    """Options that are read only with one of these values."""

    @property
    def reads_as(self) -> tuple[str, ...]:
        """Methods of ours that an adapter becomes."""
        return (*self.also, *self.methods)

    def read(self, source: Source) -> Translation:
        """Return the adapter in our terms.

        Raises:
            AdapterFileError: it is inconsistent, or needs a base model that is not known.
        """
        raise NotImplementedError

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the adapter in PEFT's terms, or None if PEFT cannot hold it in this form."""
        return None

    def refuse_options(self, config: Table[str, Any]) -> None:
        """Raise for an option that makes the adapter another function than ours.

        Raises:
            AdapterFileError: naming the option.
        """
        for name, allowed in self.neutral.items():
            value = config.get(name)
            if value and value not in allowed:
                raise AdapterFileError(f"PEFT's {self.kind} with {name}={value!r} is not supported")


_MAPPINGS: dict[str, Mapping] = {}


def register(mapping: Callable[[], Mapping]) -> Callable[[], Mapping]:
    """Add a mapping class under its name."""
    item = mapping()
    _MAPPINGS[item.kind] = item
    return mapping


def find_mapping(kind: str) -> Mapping:
    """Return the mapping of one of PEFT's methods.

    Raises:
        AdapterFileError: it is none that can be read.
    """
    if kind not in _MAPPINGS:
        raise AdapterFileError(
            f"PEFT's {kind} cannot be read; supported: {', '.join(sorted(_MAPPINGS))}"
        )
    return _MAPPINGS[kind]


def mapping_of(method: str) -> Mapping | None:
    """Return the mapping that writes one of our methods in its own form."""
    return next((item for item in _MAPPINGS.values() if method in item.methods), None)


def whole_layers(parts: AdapterParts, *kinds: Kind, groups: bool = False) -> bool:
    """Whether every site is a whole layer of these kinds at full strength.

    Args:
        parts: the adapter.
        *kinds: kinds of layer that PEFT has the method for.
        groups: whether grouped convolutions are the same function in PEFT.
    """
    return all(
        entry.site.key == WHOLE
        and entry.site.kind in kinds
        and entry.strength == 1.0
        and entry.padding is None
        and (groups or entry.site.groups == 1)
        for entry in parts.entries
    )


def held_by_layers(parts: AdapterParts, **names: str) -> dict[str, dict[str, Tensor]]:
    """Return parameters of every site by layer, `names` telling ours by PEFT's name."""
    return {
        entry.site.module: {
            theirs: entry.delta.get_parameter(ours) for theirs, ours in names.items()
        }
        for entry in parts.entries
    }
