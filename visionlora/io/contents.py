"""What of a model goes into an adapter file, and under which key.

| key | tensor |
|---|---|
| `adapter.<module>.<site>.<name>` | trainables of one site |
| `shared.<name>` | trainables of the model-level state |
| `frozen.<module>.<site>.<name>`, `frozen.shared.<name>` | constants: drawn, or carried |
| `base.<parameter or buffer>` | trained heads, and buffers that training changed |
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.errors import AdapterFileError
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.methods.base import Delta, Shared
from visionlora.record import hosts_of
from visionlora.sites import Site

Entries = list[tuple[Site, Delta]]


def entries_of(model: nn.Module, name: str) -> Entries:
    """Return sites and Deltas of one adapter, in module order."""
    return [
        (host.state.sites[name][key], cast(Delta, delta))
        for host in hosts_of(model).values()
        if name in host.adapters
        for key, delta in cast(nn.ModuleDict, host.adapters[name]).items()
    ]


def shared_of(model: nn.Module, name: str) -> Shared | None:
    """Return the model-level state of one adapter."""
    found: nn.ModuleDict = getattr(model, record.SHARED, nn.ModuleDict())
    return cast(Shared, found[name]) if name in found else None


def place(model: nn.Module, entries: Entries) -> list[tuple[str, Delta]]:
    """Return each Delta with its `<module>.<site>` path as it is in this model.

    A layer built on its own does not know its name, so the path is looked up rather than read from
    the site.
    """
    paths = {
        id(delta): f"{path}.{key}" if path else key
        for path, host in hosts_of(model).items()
        for group in host.adapters.values()
        for key, delta in cast(nn.ModuleDict, group).items()
    }
    return [(paths.get(id(delta), site.name), delta) for site, delta in entries]


def trained_tensors(
    placed: Iterable[tuple[str, Delta]], shared: Shared | None
) -> dict[str, Tensor]:
    """Return the trainables of an adapter by file key."""
    tensors: dict[str, Tensor] = {
        f"adapter.{path}.{name}": parameter
        for path, delta in placed
        for name, parameter in delta.named_parameters()
    }
    if shared is not None:
        tensors |= {f"shared.{name}": parameter for name, parameter in shared.named_parameters()}
    return tensors


def seeded_tensors(placed: Iterable[tuple[str, Delta]], shared: Shared | None) -> dict[str, Tensor]:
    """Return the seeded tensors of an adapter by file key."""
    tensors = {
        f"frozen.{path}.{name}": tensor
        for path, delta in placed
        for name, tensor in delta.frozen().items()
    }
    if shared is not None:
        tensors |= {f"frozen.shared.{name}": tensor for name, tensor in shared.frozen().items()}
    return tensors


def mark_carried(
    tensors: Iterable[str], placed: Iterable[tuple[str, Delta]], shared: Shared | None
) -> None:
    """Remember which modules have seeded tensors from a file, which may not be ours to draw."""
    keys = set(tensors)
    for module, held in _owners(placed, shared):
        if keys & set(held):
            module.carried = True


def carried_tensors(
    placed: Iterable[tuple[str, Delta]], shared: Shared | None
) -> dict[str, Tensor]:
    """Return the constant tensors that cannot be drawn again, by file key."""
    result: dict[str, Tensor] = {}
    for module, held in _owners(placed, shared):
        if module.carried:
            result |= held
    return result


def _owners(
    placed: Iterable[tuple[str, Delta]], shared: Shared | None
) -> list[tuple[Delta | Shared, dict[str, Tensor]]]:
    """Return each module that has constant tensors, with these."""
    owners: list[tuple[Delta | Shared, dict[str, Tensor]]] = [
        (delta, seeded_tensors([(path, delta)], None)) for path, delta in placed
    ]
    if shared is not None:
        owners.append((shared, seeded_tensors([], shared)))
    return owners


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return trained base parameters and changed buffers by file key."""
    heads = {name: item for name, item in record.base_parameters(model) if item.requires_grad}
    return {
        f"base.{name}": item for name, item in {**heads, **record.changed_buffers(model)}.items()
    }


def base_figures(model: nn.Module, sites: Iterable[Site]) -> dict[str, list[float]]:
    """Return norm, first, middle and last value of each adapted weight, to recognise a base."""
    figures = {}
    for site in sites:
        module = model.get_submodule(site.module)
        name = parameter_name(module, site.key)
        kept = getattr(getattr(module, "state", None), "originals", None) or {}
        figures[site.name] = figures_of(view_of(kept.get(name, stored(module, name)), site))
    return figures


def figures_of(weight: Tensor) -> list[float]:
    """Return norm, first, middle and last value of a weight view."""
    flat = weight.detach().float().reshape(-1)
    picked = torch.stack([flat.norm(), flat[0], flat[flat.numel() // 2], flat[-1]])
    return [float(value) for value in picked]


def fingerprint(tensor: Tensor) -> list[float]:
    """Return the first eight values of a seeded tensor, then a weighted sum of all of them.

    The sum tells apart tensors that differ only further on, such as factors of a weight whose rows
    were permuted in another order.
    """
    flat = tensor.detach().reshape(-1).to("cpu", torch.float64)
    weights = torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()
    picked = torch.cat([flat[:8], (flat @ weights / max(len(flat), 1) ** 0.5)[None]])
    return [float(value) for value in picked.float()]


def refuse_non_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` for the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{where}: tensor {key} holds NaN or infinity")


def same_site(one: Site, other: Site) -> bool:
    """Whether two sites have the same weight view."""
    return (one.kind, one.out_features, one.in_features, one.rows, one.groups) == (
        other.kind,
        other.out_features,
        other.in_features,
        other.rows,
        other.groups,
    )
