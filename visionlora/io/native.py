"""The native adapter file: one safetensors file with its description in the metadata.

The tensors are those of `visionlora.io.contents`. The metadata holds, as JSON, the configurations,
the sites with their shapes, fingerprints of the seeded tensors, and a few numbers of every adapted
weight, by which a wrong base model is recognised. `load` reads and checks everything before it
touches the model, so a refused file leaves the model as it was.
"""

import dataclasses
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.build import PreparedAdapter, install, prepare_adapter, refuse_merged
from visionlora.errors import AdapterFileError, AdapterStateError, VisionLoraError
from visionlora.hosts import find_adapter
from visionlora.io import checks, contents
from visionlora.io.adapter_file import write_description
from visionlora.io.atomic import write_atomically
from visionlora.io.known import ModelLayers
from visionlora.io.opening import open_adapter
from visionlora.record import adapter_names


def save(
    model: nn.Module, path: str | Path, *, name: str | None = None, frozen: bool = False
) -> Path:
    """Write one adapter, the trained heads and the changed buffers to a safetensors file.

    Args:
        model: a model with at least one adapter.
        path: the file; folders are made, an old file is replaced only when the new one is complete.
        name: which adapter; may be omitted if there is one.
        frozen: store seeded tensors too, instead of drawing them again when the file is loaded.
            Those that cannot be drawn again, or came from a file themselves, always are.

    Raises:
        AdapterStateError: there is no such adapter.
        AdapterFileError: a tensor holds NaN or infinity.
        OutputError: the file cannot be written.
    """
    name = _choose(model, name)
    entries = contents.entries_of(model, name)
    placed = contents.place(model, entries)
    shared = contents.shared_of(model, name)
    seeded = contents.seeded_tensors(placed, shared)
    tensors = adapter_state_dict(model, name) | (seeded if frozen else {})
    contents.refuse_non_finite(tensors, "cannot save")
    sites = [
        dataclasses.replace(site, module=path.rpartition(".")[0])
        for (site, _), (path, _) in zip(entries, placed, strict=True)
    ]
    description = write_description(
        [(site, delta.config) for site, (_, delta) in zip(sites, placed, strict=True)],
        {key: contents.fingerprint(tensor) for key, tensor in seeded.items()},
        contents.base_figures(model, sites),
    )
    data = safetensors.torch.save(
        {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()},
        {"visionlora": description},
    )
    return write_atomically(path, lambda temporary: _write(temporary, data))


def load(
    model: nn.Module, path: str | Path, *, name: str = "default", check_base: bool = True
) -> nn.Module:
    """Load an adapter: inject it if the model lacks it, then set all values.

    The file shows what it is: one of our own, or an adapter of PEFT (its folder, or either file).

    Args:
        model: the base model, or one that already has an adapter `name` on the same sites.
        path: a file written by `save`, or a PEFT folder or file.
        name: name that the adapter gets in this model.
        check_base: refuse a base model whose adapted weights differ from those trained on.

    Raises:
        AdapterFileError: the file is unreadable, truncated, inconsistent, or for another model; the
            model is untouched.
    """
    file = open_adapter(path, ModelLayers(model))
    checks.check_sites(model, file)
    if check_base:
        checks.check_base(model, file)
    refuse_merged(model, "load")
    prepared: PreparedAdapter | None = None
    try:
        if name in adapter_names(model):
            placed = contents.place(model, contents.entries_of(model, name))
            shared = contents.shared_of(model, name)
            checks.check_meaning(file, placed)
        else:
            prepared = prepare_adapter(model, file.plan, name=name)
            groups = prepared.deltas.values()
            placed = [(site.name, delta) for group in groups for site, delta in group.values()]
            shared = prepared.shared
        seeded = contents.seeded_tensors(placed, shared)
        targets = contents.trained_tensors(placed, shared)
        targets |= {key: tensor for key, tensor in seeded.items() if key in file.tensors}
        if prepared is not None:
            targets |= contents.carried_tensors(placed, shared)
        targets |= _base_targets(model, file.tensors)
        checks.check_fit(file.tensors, targets)
        checks.check_seeded(file, seeded)
    except VisionLoraError as error:
        raise AdapterFileError(f"{file.path}: {error}") from error
    if prepared is not None:
        install(model, prepared)  # first, so that the record holds the buffers of the base model
    _copy(file.tensors, targets)
    contents.mark_carried(file.tensors, placed, shared)
    for key, target in targets.items():
        if key.startswith("base.") and isinstance(target, nn.Parameter):
            target.requires_grad_(True)  # a trained head stays one, and is saved again
    return model


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return what one adapter was trained to, by file key.

    That is trainables, trained heads, changed buffers, and constants that cannot be drawn again.
    """
    name = _choose(model, name)
    return _own_tensors(model, name) | contents.base_tensors(model)


def load_adapter_state_dict(
    model: nn.Module, tensors: dict[str, Tensor], *, name: str | None = None
) -> None:
    """Copy the values of `adapter_state_dict` into an adapter that is there.

    Raises:
        AdapterFileError: unknown or missing keys, wrong shapes or NaN; nothing is changed then.
    """
    name = _choose(model, name)
    refuse_merged(model, "load")
    targets = _own_tensors(model, name) | _base_targets(model, tensors)
    checks.check_fit(tensors, targets)
    contents.refuse_non_finite(tensors, "cannot load")
    _copy(tensors, targets)


def _own_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return trainables and carried constants of an adapter, by file key."""
    placed = contents.place(model, contents.entries_of(model, name))
    shared = contents.shared_of(model, name)
    return contents.trained_tensors(placed, shared) | contents.carried_tensors(placed, shared)


def _choose(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is not None:
        return find_adapter(names, name)
    if len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    return names[0]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _base_targets(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    everything = {**dict(record.base_parameters(model)), **record.persistent_buffers(model)}
    return {
        key: everything[key.removeprefix("base.")]
        for key in tensors
        if key.startswith("base.") and key.removeprefix("base.") in everything
    }


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    for key, target in targets.items():
        target.copy_(tensors[key])
