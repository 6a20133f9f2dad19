"""How an existing layer becomes a host: its class is swapped in place.

`attach` turns a `Linear` into an `AdaptedLinear` that is still a `Linear`: the object, its name,
hooks, `isinstance` checks and checkpoint keys stay, and adapter tensors appear under
`<module>.adapters.<name>.<site>.*`. `release` turns it back. `train()`, `eval()`, `repr` and
saving have no effect on weights.

A host knows layers, not methods: it asks each Delta for factors, an update or the dense change.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from visionlora.errors import AdapterStateError, nearest
from visionlora.methods.base import Delta
from visionlora.methods.parts.noise import without_noise
from visionlora.sites import Site

logger = logging.getLogger("visionlora")

Mode = Literal["auto", "factored", "dense"]


@dataclass(frozen=True)
class Slot:
    """One active change of a layer."""

    key: str
    rows: tuple[int, int] | None
    delta: Delta
    strength: float
    """Multiplier set by `set_scale`."""

    @property
    def scale(self) -> float:
        """Factor in front of `up @ down`."""
        return self.strength * self.delta.scale


@dataclass
class HostState:
    """What a host remembers beside its adapter modules."""

    mode: Mode = "auto"
    active: tuple[str, ...] = ()
    enabled: bool = True
    strengths: dict[str, float] = field(default_factory=dict)
    sites: dict[str, dict[str, Site]] = field(default_factory=dict)
    originals: dict[str, Tensor] | None = None
    """Copies of the weights that `merge` changed; None while unmerged."""


class Host:
    """Mixin in front of an `nn.Module` class; see the module docstring."""

    plain_class: ClassVar[type[nn.Module]]
    adapters: nn.ModuleDict
    state: HostState
    _slots: tuple[Slot, ...]

    # -- views of the frozen weight

    def site(self, key: str) -> Site:
        """Return the site of a key that some adapter of this layer has."""
        return next(sites[key] for sites in self.state.sites.values() if key in sites)

    def view(self, key: str) -> Tensor:
        """Return the frozen weight of a site as `(out, in)`."""
        return view_of(stored(self, parameter_name(self, key)), self.site(key))

    def store(self, key: str, value: Tensor) -> None:
        """Overwrite the frozen weight of a site, given as `(out, in)`, in place."""
        weight, site = stored(self, parameter_name(self, key)), self.site(key)
        rows = rows_of(weight, site.rows)
        rows.copy_(value.t() if site.kind == "embedding" else value.reshape(rows.shape))

    # -- adapters

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The changes that apply now: none while merged or disabled."""
        return self._slots

    def refresh(self) -> None:
        """Recompute `slots` after any change of state."""
        state = self.state
        if not state.enabled or state.originals is not None:
            self._slots = ()
            return
        self._slots = tuple(self.all_slots())

    def all_slots(self) -> list[Slot]:
        """Return the changes of the active adapters, merged or not."""
        return [
            Slot(
                key,
                self.state.sites[name][key].rows,
                cast(Delta, delta),
                self.state.strengths[name],
            )
            for name in self.state.active
            for key, delta in cast(nn.ModuleDict, self.adapters[name]).items()
        ]

    def change(self, slot: Slot) -> Tensor:
        """Return the dense change of a slot, `(out, in)`, at its strength."""
        dense = slot.strength * slot.delta.delta(self.view(slot.key))
        padding = getattr(self, "padding_idx", None)  # an embedding's padding row never changes
        if padding is not None:
            dense = dense.index_fill(1, torch.tensor([padding], device=dense.device), 0.0)
        return dense

    def add(self, name: str, deltas: dict[str, tuple[Site, Delta]]) -> None:
        """Add an adapter and make it active beside the others."""
        if self.state.originals is not None:
            raise AdapterStateError("the model is merged: unmerge before adding an adapter")
        self.adapters[name] = nn.ModuleDict({key: delta for key, (_, delta) in deltas.items()})
        self.state.sites[name] = {key: site for key, (site, _) in deltas.items()}
        self.state.strengths[name] = 1.0
        self.state.active = (*self.state.active, name)
        self.refresh()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active changes to the weights, rounding once, and keep copies for `unmerge`."""
        slots = self.all_slots()
        changes = []
        biases = []
        for slot in slots:  # in full precision, even where autocast is on
            quiet = without_noise(slot.delta)
            with quiet, torch.autocast(self.view(slot.key).device.type, enabled=False):
                changes.append((slot.key, self.change(slot)))
                shift = slot.delta.bias_change()
                if shift is not None:
                    biases.append((slot.key, slot.strength * shift))
        self.state.originals = {}
        names = [parameter_name(self, slot.key) for slot in slots]
        for name in names + [bias_name(self, key) for key, _ in biases]:
            if name not in self.state.originals:
                self.state.originals[name] = stored(self, name).detach().clone()
        for key, change in changes:
            weight = self.view(key)
            merged = (weight.to(change.dtype) + change).to(weight.dtype)
            if weight.dtype in (torch.float16, torch.bfloat16):
                _warn_of_lost_change(self.plain_class.__name__, weight, merged, change)
            self.store(key, merged)
        for key, shift in biases:
            bias = rows_of(stored(self, bias_name(self, key)), bias_rows(self, self.site(key)))
            bias.copy_((bias.to(shift.dtype) + shift).to(bias.dtype))
        self.refresh()

    @torch.no_grad()
    def unmerge(self, *, restore: bool = True) -> None:
        """Leave the merged state; with `restore` put the copied weights back, bit for bit."""
        for name, original in (self.state.originals or {}).items():
            if restore:
                stored(self, name).copy_(original)
        self.state.originals = None
        self.refresh()

    def extra_repr(self) -> str:
        """Add the adapters to the layer's own description."""
        own = cast(Any, super()).extra_repr()
        return (
            f"{own}, adapters={list(self.adapters)}" if own else f"adapters={list(self.adapters)}"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through the plain class: the swapped class is made at run time."""
        if "generated" in type(self).__dict__:
            return _blank, (_host_base(type(self)), self.plain_class), self.__dict__.copy()
        return super().__reduce_ex__(protocol)


_CLASSES: dict[tuple[type, type], type] = {}


def host_class(host: type[Host], plain: type[nn.Module]) -> type:
    """Return the class that is both `host` and `plain`, made once per pair."""
    if (host, plain) not in _CLASSES:
        body = {"plain_class": plain, "generated": host, "__doc__": plain.__doc__}
        _CLASSES[host, plain] = type(f"Adapted{plain.__name__}", (host, plain), body)
    return _CLASSES[host, plain]


def prepare(module: nn.Module, mode: Mode) -> None:
    """Give a layer whose class is already a host its empty adapter state."""
    module.adapters = nn.ModuleDict()
    module.state = HostState(mode=mode)  # type: ignore[assignment]
    module._slots = ()  # type: ignore[assignment]


def attach(module: nn.Module, host: type[Host], mode: Mode) -> Host:
    """Swap the class of a plain layer; a layer that is a host already is returned as it is.

    Raises:
        AdapterStateError: the layer is a host in another mode.
    """
    if isinstance(module, Host):
        return module
    plain = type(module)
    module.__class__ = host_class(host, plain)
    prepare(module, mode)
    return cast(Host, module)


def release(module: nn.Module) -> None:
    """Turn a host back into the plain layer it was made from."""
    assert isinstance(module, Host)
    plain = module.plain_class
    for attribute in ("adapters", "state", "_slots"):
        delattr(module, attribute)
    cast(Any, module).__class__ = plain


def find_adapter(names: list[str], name: str) -> str:
    """Return `name` if it is known.

    Raises:
        AdapterStateError: it is not.
    """
    if name not in names:
        raise AdapterStateError(
            f"no adapter named {name!r}{nearest(name, names)}; the model has {names or 'none'}"
        )
    return name


def parameter_name(module: Any, key: str) -> str:
    """Return the name of the stored tensor behind a site, relative to the layer."""
    if not isinstance(module, nn.MultiheadAttention):
        return "weight"
    if key == "out":
        return "out_proj.weight"
    return "in_proj_weight" if module._qkv_same_embed_dim else f"{key}_proj_weight"


def bias_name(module: Any, key: str) -> str:
    """Return the name of the stored bias of a site, relative to the layer."""
    if not isinstance(module, nn.MultiheadAttention):
        return "bias"
    return "out_proj.bias" if key == "out" else "in_proj_bias"


def bias_rows(module: Any, site: Site) -> tuple[int, int] | None:
    """Return the entries of the stored bias that a site covers."""
    if isinstance(module, nn.MultiheadAttention) and site.key != "out":
        start = "qkv".index(site.key) * module.embed_dim
        return start, start + module.embed_dim
    return site.rows


def stored(module: Any, name: str) -> Tensor:
    """Return a parameter by its dotted name, bypassing properties of the swapped class."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    return cast(Tensor, module._parameters[leaf])


def is_quantised(weight: Tensor) -> bool:
    """Tell whether a weight holds codes: integers, or floats of 8 bits, which have scales apart."""
    return not weight.is_floating_point() or weight.element_size() < 2


def rows_of(weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """Return the rows of a weight that a site covers."""
    return weight if rows is None else weight[rows[0] : rows[1]]


def view_of(weight: Tensor, site: Site) -> Tensor:
    """Return a stored weight as the site's `(out, in)` view."""
    if site.kind == "embedding":
        return weight.t()
    rows = rows_of(weight, site.rows)
    return rows[:, None] if site.kind == "norm" else rows.flatten(1)


def _blank(host: type[Host], plain: type[nn.Module]) -> nn.Module:
    cls: Any = host_class(host, plain)
    return cast(nn.Module, cls.__new__(cls))


def _host_base(cls: type) -> type[Host]:
    return cast(type[Host], cls.__dict__["generated"])


def _warn_of_lost_change(layer: str, weight: Tensor, merged: Tensor, change: Tensor) -> None:
    moved = change != 0
    count = int(moved.sum())
    lost = float(((merged == weight) & moved).sum()) / max(count, 1)
    if lost > 0.05:
        logger.warning(
            "merging into %s weights leaves %.0f %% of the changed entries of a %s unmoved; merge "
            "in float32",
            str(weight.dtype).removeprefix("torch."),
            100 * lost,
            layer,
        )
