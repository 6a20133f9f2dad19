"""What a model remembers so that `eject` can restore it and `save` can find what was trained.

The record sits on the root as a plain attribute: it adds no parameter, buffer or checkpoint key.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.hosts import Host
from visionlora.methods.base import Delta, Shared

SHARED = "visionlora_shared"
_RECORD = "_visionlora_record"


class SharedStates(nn.ModuleDict):
    """The Shared modules of a model, by adapter name, at its root.

    A root that calls all its children in turn (`nn.Sequential`) calls this one too, so it passes on
    what it is given.
    """

    def forward(self, *inputs: Any) -> Any:
        """Return the input."""
        return inputs[0] if len(inputs) == 1 else inputs


@dataclass
class ModelRecord:
    """State of a model before the first adapter was injected."""

    requires_grad: dict[str, bool] = field(default_factory=dict)
    """Flag of every base parameter."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the persistent buffers, such as batch-norm statistics, which training changes."""


def record_of(model: nn.Module) -> ModelRecord | None:
    """Return the record, or None for a model that was built from adapted layers."""
    return getattr(model, _RECORD, None)


def start_record(model: nn.Module) -> ModelRecord:
    """Return the record, made now if there is none."""
    found = record_of(model)
    if found is None:
        found = ModelRecord(
            {name: parameter.requires_grad for name, parameter in base_parameters(model)},
            {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()},
        )
        object.__setattr__(model, _RECORD, found)
    return found


def drop_record(model: nn.Module, *, restore_buffers: bool) -> None:
    """Put flags (and buffers) back as they were, and forget the record."""
    found = record_of(model)
    if found is None:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(found.requires_grad.get(name, parameter.requires_grad))
    if restore_buffers:
        with torch.no_grad():
            for name, buffer in persistent_buffers(model).items():
                if name in found.buffers:
                    buffer.copy_(found.buffers[name])
    object.__delattr__(model, _RECORD)


def changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers that differ from the base model's.

    Without a record nothing is known of the base, so all of them count.
    """
    found = record_of(model)
    current = persistent_buffers(model)
    if found is None:
        return current
    return {
        name: buffer
        for name, buffer in current.items()
        if name not in found.buffers
        or not torch.equal(buffer, found.buffers[name].to(buffer.device))
    }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint of the base model would hold."""
    result: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Delta | Shared):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                result[f"{prefix}.{name}" if prefix else name] = buffer
    return result


def hosts_of(model: nn.Module) -> dict[str, Host]:
    """Return `{module name: host}` of all adapted layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Host)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for host in hosts_of(model).values() for name in host.adapters))


def adapter_parameter_owners(model: nn.Module) -> dict[int, str]:
    """Return `{id(parameter): adapter name}` for all parameters of Deltas and Shared modules."""
    owners: dict[int, str] = {}
    for host in hosts_of(model).values():
        for name, group in host.adapters.items():
            owners.update((id(parameter), name) for parameter in group.parameters())
    for name, shared in getattr(model, SHARED, nn.ModuleDict()).items():
        owners.update((id(parameter), name) for parameter in shared.parameters())
    return owners


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters that belong to the model itself."""
    owners = adapter_parameter_owners(model)
    return [(name, item) for name, item in model.named_parameters() if id(item) not in owners]
