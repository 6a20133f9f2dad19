"""The native adapter file: one safetensors file with its description in the metadata.

The tensors are those of `visionlora.io.contents`. The metadata holds, as JSON, the configurations,
the sites with their shapes, fingerprints of the seeded tensors, and a few numbers of every adapted
weight, by which a wrong base model is recognised. `load` reads and checks everything before it
touches the model, so a refused file leaves the model as it was.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.build import PreparedAdapter, install, prepare_adapter, refuse_merged
from visionlora.config import AdapterConfig, check_fields
from visionlora.errors import AdapterFileError, AdapterStateError, VisionLoraError, nearest
from visionlora.hosts import describe, find_adapter
from visionlora.io import contents
from visionlora.io.atomic import write_atomically
from visionlora.methods.base import Delta
from visionlora.record import adapter_names
from visionlora.registry import build_config
from visionlora.sites import Site

FORMAT = "visionlora-adapter"
VERSION = 1
# Weights cast to half precision still count as the same base model.
_BASE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class AdapterFile:
    """A parsed and validated adapter file."""

    path: Path
    plan: list[tuple[Site, AdapterConfig]]
    tensors: dict[str, Tensor]
    frozen: dict[str, list[float]]
    """Fingerprints of seeded tensors."""
    base: dict[str, list[float]]
    """Figures of the adapted weights."""


def save(
    model: nn.Module, path: str | Path, *, name: str | None = None, frozen: bool = False
) -> Path:
    """Write one adapter, the trained heads and the changed buffers to a safetensors file.

    Args:
        model: a model with at least one adapter.
        path: the file; folders are made, an old file is replaced only when the new one is complete.
        name: which adapter; may be omitted if there is one.
        frozen: store seeded tensors too, instead of drawing them again when the file is loaded.

    Raises:
        AdapterStateError: there is no such adapter.
        AdapterFileError: a tensor holds NaN or infinity.
        OutputError: the file cannot be written.
    """
    name = _choose(model, name)
    entries = contents.entries_of(model, name)
    placed = contents.place(model, entries)
    seeded = contents.seeded_tensors(placed, contents.shared_of(model, name))
    tensors = adapter_state_dict(model, name) | (seeded if frozen else {})
    contents.refuse_non_finite(tensors, "cannot save")
    configs = list(dict.fromkeys(delta.config for _, delta in placed))
    sites = [
        dataclasses.replace(site, module=path.rpartition(".")[0])
        for (site, _), (path, _) in zip(entries, placed, strict=True)
    ]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "configs": [config.to_dict() for config in configs],
        "sites": [
            [dataclasses.asdict(site), configs.index(delta.config)]
            for site, (_, delta) in zip(sites, placed, strict=True)
        ],
        "frozen": {key: contents.fingerprint(tensor) for key, tensor in seeded.items()},
        "base": contents.base_figures(model, sites),
    }
    data = safetensors.torch.save(
        {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()},
        {"visionlora": json.dumps(header)},
    )
    return write_atomically(path, lambda temporary: _write(temporary, data))


def load(
    model: nn.Module, path: str | Path, *, name: str = "default", check_base: bool = True
) -> nn.Module:
    """Load an adapter file: inject its adapter if the model lacks it, then set all values.

    Args:
        model: the base model, or one that already has an adapter `name` on the same sites.
        path: a file written by `save`.
        name: name that the adapter gets in this model.
        check_base: refuse a base model whose adapted weights differ from those trained on.

    Raises:
        AdapterFileError: the file is unreadable, truncated, inconsistent, or for another model; the
            model is untouched.
    """
    file = read_adapter(path)
    _check_sites(model, file)
    if check_base:
        _check_base(model, file)
    refuse_merged(model, "load")
    prepared: PreparedAdapter | None = None
    try:
        if name in adapter_names(model):
            placed = contents.place(model, contents.entries_of(model, name))
            shared = contents.shared_of(model, name)
            _check_meaning(file, placed)
        else:
            prepared = prepare_adapter(model, file.plan, name=name)
            groups = prepared.deltas.values()
            placed = [(site.name, delta) for group in groups for site, delta in group.values()]
            shared = prepared.shared
        seeded = contents.seeded_tensors(placed, shared)
        targets = contents.trained_tensors(placed, shared)
        targets |= {key: tensor for key, tensor in seeded.items() if key in file.tensors}
        targets |= _base_targets(model, file.tensors)
        _check_fit(file.tensors, targets)
        _check_seeded(file, seeded)
    except VisionLoraError as error:
        raise AdapterFileError(f"{file.path}: {error}") from error
    if prepared is not None:
        install(model, prepared)  # first, so that the record holds the buffers of the base model
    _copy(file.tensors, targets)
    for key, target in targets.items():
        if key.startswith("base.") and isinstance(target, nn.Parameter):
            target.requires_grad_(True)  # a trained head stays one, and is saved again
    return model


def read_adapter(path: str | Path) -> AdapterFile:
    """Read and validate an adapter file without a model.

    Raises:
        AdapterFileError: it is missing, truncated, not of this format, or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"no adapter file at {path}")
    try:
        with safetensors.safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} is truncated or not a safetensors file ({error})"
        ) from error
    if "visionlora" not in metadata:
        raise AdapterFileError(f"{path} has no visionlora description: another tool wrote it")
    try:
        header = json.loads(metadata["visionlora"])
        if header["format"] != FORMAT or header["version"] > VERSION:
            raise AdapterFileError(
                f"{path} has format {header['format']} version {header['version']}; this version "
                f"of "
                f"visionlora reads {FORMAT} up to version {VERSION}"
            )
        configs = [_read_config(item) for item in header["configs"]]
        plan = [(_read_site(item), configs[index]) for item, index in header["sites"]]
        frozen = {key: _numbers(item) for key, item in header["frozen"].items()}
        base = {site.name: _numbers(header["base"][site.name], 4) for site, _ in plan}
        file = AdapterFile(path, plan, tensors, frozen, base)
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AdapterFileError(f"{path} has a damaged description ({error})") from error
    if not plan:
        raise AdapterFileError(f"{path} describes no site")
    contents.refuse_non_finite(tensors, str(path))
    return file


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return trainables, trained heads and changed buffers of one adapter, by file key."""
    name = _choose(model, name)
    placed = contents.place(model, contents.entries_of(model, name))
    trained = contents.trained_tensors(placed, contents.shared_of(model, name))
    return trained | contents.base_tensors(model)


def load_adapter_state_dict(
    model: nn.Module, tensors: dict[str, Tensor], *, name: str | None = None
) -> None:
    """Copy the values of `adapter_state_dict` into an adapter that is there.

    Raises:
        AdapterFileError: unknown or missing keys, wrong shapes or NaN; nothing is changed then.
    """
    name = _choose(model, name)
    refuse_merged(model, "load")
    placed = contents.place(model, contents.entries_of(model, name))
    targets = contents.trained_tensors(placed, contents.shared_of(model, name))
    targets |= _base_targets(model, tensors)
    _check_fit(tensors, targets)
    contents.refuse_non_finite(tensors, "cannot load")
    _copy(tensors, targets)


def _choose(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is not None:
        return find_adapter(names, name)
    if len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    return names[0]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _read_config(item: dict[str, Any]) -> AdapterConfig:
    return build_config(
        item["method"], {key: value for key, value in item.items() if key != "method"}
    )


def _read_site(item: dict[str, Any]) -> Site:
    rows = item["rows"]
    site = Site(**{**item, "rows": None if rows is None else (int(rows[0]), int(rows[1]))})
    check_fields(site)
    return site


def _numbers(values: Any, count: int | None = None) -> list[float]:
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, got {len(values)}")
    return [float(value) for value in values]


def _check_sites(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a model that lacks a site of the file or has it in another shape."""
    modules = dict(model.named_modules())
    kind = type(model).__name__
    for site, _ in file.plan:
        module = modules.get(site.module)
        if module is None:
            raise AdapterFileError(
                f"{file.path} is for another model: this {kind} has no layer {site.module!r}"
                f"{nearest(site.module, modules)}"
            )
        try:
            here = describe(site.module, module, site.key)
        except (VisionLoraError, StopIteration, KeyError) as error:
            raise AdapterFileError(
                f"{file.path} is for another model: {site.module} is a {type(module).__name__} here"
            ) from error
        if not contents.same_site(here, site):
            raise AdapterFileError(
                f"{file.path} is for another model: {site.name} is {here.out_features} x "
                f"{here.in_features} here and {site.out_features} x {site.in_features} in the file"
            )


def _check_base(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a model whose adapted weights are not those the adapter was trained on."""
    here = contents.base_figures(model, [site for site, _ in file.plan])
    for name, there in file.base.items():
        norm = max(abs(there[0]), 1e-12)
        close = abs(here[name][0] - there[0]) <= _BASE_TOLERANCE * norm and all(
            abs(one - other) <= _BASE_TOLERANCE * max(abs(other), 1e-3 * norm)
            for one, other in zip(here[name][1:], there[1:], strict=True)
        )
        if not close:
            raise AdapterFileError(
                f"{file.path} was trained on other base weights: {name} differs; load the weights "
                f"it was "
                "trained on, or pass check_base=False"
            )


def _check_seeded(file: AdapterFile, seeded: dict[str, Tensor]) -> None:
    """Refuse seeded tensors that came out differently and are not stored in the file."""
    for key, there in file.frozen.items():
        if key in file.tensors:
            continue
        here = contents.fingerprint(seeded[key]) if key in seeded else []
        if len(here) != len(there) or any(
            abs(one - other) > 1e-6 * max(1.0, abs(other))
            for one, other in zip(here, there, strict=True)
        ):
            raise AdapterFileError(
                f"seeded tensor {key} differs from the one trained with; save again with "
                f"frozen=True "
                "where it was trained"
            )


def _check_meaning(file: AdapterFile, placed: list[tuple[str, Delta]]) -> None:
    """Refuse values for an adapter that is there with other options, such as another scale."""
    there = {site.name: config for site, config in file.plan}
    for path, delta in placed:
        here = delta.config.meaning()
        for key, value in (there[path].meaning() if path in there else {}).items():
            if here.get(key) != value:
                raise AdapterFileError(
                    f"{path} has {key} {here.get(key)!r} in the model and {value!r} in the file; "
                    "load it under another name"
                )


def _base_targets(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    everything = {**dict(record.base_parameters(model)), **record.persistent_buffers(model)}
    return {
        key: everything[key.removeprefix("base.")]
        for key in tensors
        if key.startswith("base.") and key.removeprefix("base.") in everything
    }


def _check_fit(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Raise unless both have the same keys and shapes."""
    unknown = [key for key in tensors if key not in targets]
    missing = [key for key in targets if key not in tensors]
    if unknown:
        raise AdapterFileError(
            f"unknown tensor {unknown[0]}{nearest(unknown[0], targets)} ({len(unknown)} in all)"
        )
    if missing:
        raise AdapterFileError(f"missing tensor {missing[0]} ({len(missing)} in all)")
    for key, target in targets.items():
        if target.shape != tensors[key].shape:
            raise AdapterFileError(
                f"{key} has shape {tuple(tensors[key].shape)}, this model needs "
                f"{tuple(target.shape)}"
            )


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    for key, target in targets.items():
        target.copy_(tensors[key])
