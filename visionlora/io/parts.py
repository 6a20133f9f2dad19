"""An adapter taken out of a model or a file: sites, Deltas, and what was trained beside them.

Writers for other tools work on these parts, so they need no model where a file says enough. Base
weights that are not known are stood in for by NaN: a value that depends on them gives itself away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, AdapterStateError, ConfigError, VisionLoraError
from visionlora.hosts import find_adapter
from visionlora.io import checks, contents
from visionlora.io.adapter_file import AdapterFile
from visionlora.io.known import KnownLayers, ModelLayers
from visionlora.methods.base import Delta, Shared
from visionlora.methods.parts.noise import without_noise
from visionlora.record import adapter_names, hosts_of
from visionlora.registry import get_method
from visionlora.sites import Site, named_generator


@dataclass(frozen=True)
class Entry:
    """One site of an adapter."""

    site: Site
    delta: Delta
    strength: float = 1.0
    """Multiplier set by `set_scale`."""
    padding: int | None = None
    """Row of an embedding that no adapter changes."""

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.delta.config.method


@dataclass(frozen=True)
class AdapterParts:
    """One adapter, apart from any model."""

    entries: list[Entry]
    shared: Shared | None
    heads: dict[str, Tensor]
    """Trained parameters and changed buffers of the base model, by name."""
    known: KnownLayers
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Figures of the adapted weights, by which files recognise a base model."""

    @property
    def methods(self) -> set[str]:
        """Names of the methods."""
        return {entry.method for entry in self.entries}

    @torch.no_grad()
    def change(self, entry: Entry) -> Tensor:
        """Return the dense change of a site, `(out, in)`.

        Raises:
            AdapterFileError: it depends on a base weight that is not known.
        """
        weight = self.known.weight(entry.site)
        try:
            with without_noise(entry.delta) as delta:
                dense = entry.strength * delta.delta(
                    unknown_weight(entry.site) if weight is None else weight
                )
        except RuntimeError:  # no singular value decomposition of NaN
            if weight is not None:
                raise
            raise needs_base(entry) from None
        if weight is None and not bool(torch.isfinite(dense).all()):
            raise needs_base(entry)
        if entry.padding is not None:
            dense[:, entry.padding] = 0.0
        return dense


def parts_of_model(model: nn.Module, name: str | None = None) -> AdapterParts:
    """Return the parts of an adapter that is in a model.

    Raises:
        AdapterStateError: there is no such adapter, or it routes by input.
    """
    names = adapter_names(model)
    if name is None and len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    name = names[0] if name is None else find_adapter(names, name)
    entries = []
    for path, host in hosts_of(model).items():
        for key, site in host.state.sites.get(name, {}).items():
            delta = host.adapters[name][key]  # type: ignore[index]
            refuse_routed(delta)
            entries.append(
                Entry(
                    replace(site, module=path),
                    delta,
                    host.state.strengths[name],
                    getattr(host, "padding_idx", None),
                )
            )
    return AdapterParts(
        entries,
        contents.shared_of(model, name),
        {key.removeprefix("base."): item for key, item in contents.base_tensors(model).items()},
        ModelLayers(model),
        contents.base_figures(model, [entry.site for entry in entries]),
    )


def parts_of_file(file: AdapterFile, known: KnownLayers) -> AdapterParts:
    """Build the parts of an adapter from its file.

    Raises:
        AdapterFileError: the file is inconsistent, or frozen tensors follow from base weights that
            are not known.
    """
    try:
        return _build(file, known)
    except AdapterFileError:
        raise
    except VisionLoraError as error:
        raise AdapterFileError(f"{file.path}: {error}") from error


@torch.no_grad()
def _build(file: AdapterFile, known: KnownLayers) -> AdapterParts:
    trained = [t for k, t in file.tensors.items() if k.startswith(("adapter.", "shared."))]
    double = any(tensor.dtype == torch.float64 for tensor in trained)
    dtype = torch.float64 if double else torch.float32
    shared = None
    for config in dict.fromkeys(config for _, config in file.plan):
        kind = get_method(config.method).shared
        if kind is not None:
            shared = kind(config, [site for site, other in file.plan if other == config])
            shared.to(dtype)
    entries = []
    for site, config in file.plan:
        config.check_site(site)
        delta = get_method(config.method).delta(config, site, shared)
        refuse_routed(delta)
        entry = Entry(site, delta.to(dtype))
        weight = known.weight(site)
        generator = named_generator(config.seed, site.name)
        try:
            delta.reset_parameters(unknown_weight(site) if weight is None else weight, generator)
        except (RuntimeError, ConfigError):  # NaN has no decomposition
            if weight is not None:
                raise
            if not {f"frozen.{site.name}.{name}" for name in delta.frozen()} <= set(file.tensors):
                raise needs_base(entry) from None
        entries.append(entry)
    placed = [(entry.site.name, entry.delta) for entry in entries]
    seeded = contents.seeded_tensors(placed, shared)
    targets = contents.trained_tensors(placed, shared)
    targets |= {key: tensor for key, tensor in seeded.items() if key in file.tensors}
    checks.check_fit({k: t for k, t in file.tensors.items() if k[:5] != "base."}, targets)
    for key, target in targets.items():
        target.copy_(file.tensors[key])
    for entry in entries:
        for tensor in entry.delta.frozen().values():
            if not bool(torch.isfinite(tensor).all()):
                raise needs_base(entry)
    checks.check_seeded(file, seeded)
    heads = {
        key.removeprefix("base."): tensor
        for key, tensor in file.tensors.items()
        if key.startswith("base.")
    }
    return AdapterParts(entries, shared, heads, known, dict(file.base))


@contextmanager
def evaluating(parts: AdapterParts) -> Iterator[None]:
    """Switch noise off inside the block: a Delta that draws some while training stops to."""
    modules = [entry.delta for entry in parts.entries]
    every = [*modules, *([] if parts.shared is None else [parts.shared])]
    before = [(item, item.training) for module in every for item in module.modules()]
    for item, _ in before:
        item.training = False
    try:
        yield
    finally:
        for item, training in before:
            item.training = training


def unknown_weight(site: Site) -> Tensor:
    """Return NaN in the shape of a site's weight; it takes no memory."""
    return torch.full((1, 1), float("nan")).expand(site.out_features, site.in_features)


def needs_base(entry: Entry) -> AdapterFileError:
    """Return the error for a base weight that is not known."""
    return AdapterFileError(
        f"{entry.method} at {entry.site.name} depends on the base weights: give the state dict of "
        "the base model (--base FILE.safetensors)"
    )


def refuse_routed(delta: Delta) -> None:
    """Raise for a change that depends on the input, which no other tool has."""
    if not delta.mergeable:
        raise AdapterStateError(
            f"{delta.config.method} routes by input: its change is no matrix and no other method's"
        )
