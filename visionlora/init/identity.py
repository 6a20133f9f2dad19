"""What tells models, batches and loss functions apart, as a digest of all that they hold."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.hosts import Host
from visionlora.methods.base import Delta, Shared
from visionlora.record import SharedStates, base_parameters


def base_digest(model: nn.Module) -> str:
    """Return the digest of a model's own layers, weights and buffers; adapters do not count."""
    digest = hashlib.sha256()
    modules = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, Delta | Shared | SharedStates)
    }
    for name, module in modules.items():
        kind = module.plain_class if isinstance(module, Host) else type(module)
        if ".adapters" not in f".{name}":
            digest.update(f"{name}:{kind.__qualname__};".encode())
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                _feed_tensor(digest, f"{name}.{leaf}", buffer)
    for name, parameter in base_parameters(model):
        _feed_tensor(digest, name, parameter)
    return digest.hexdigest()


def digest_of(*values: Any, known: Sequence[Any] = ()) -> bytes:
    """Return a digest of values: tensors, arrays, plain values, collections, functions, modules.

    A function counts with its code, defaults and what it encloses, but not with the globals it
    reads.

    Args:
        *values: what to tell apart.
        known: objects inside of values whose content is not read.

    Raises:
        ConfigError: a value whose content cannot be read.
    """
    digest = hashlib.sha256()
    seen = {id(item) for item in known}
    for value in values:
        _feed(digest, value, seen)
    return digest.digest()


def _feed(digest: Any, value: Any, seen: set[int]) -> None:
    """Take a value in, each part with its type, so that different nestings differ."""
    digest.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, Tensor):
        _feed_tensor(digest, "", value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes):
        digest.update(f"{len(value)}:".encode() + value)
    elif isinstance(value, _PLAIN):
        digest.update(f"{value!r};".encode())
    elif id(value) in seen:  # a function that knows itself
        digest.update(b"again")
    else:
        seen.add(id(value))
        for part in _parts(value):
            _feed(digest, part, seen)
        seen.discard(id(value))
    digest.update(b"</>")


def _parts(value: Any) -> list[Any]:
    """Return what a value consists of."""
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, types.FunctionType):
        cells = [_inside(cell) for cell in value.__closure__ or ()]
        own = [value.__module__, value.__qualname__, value.__code__]
        return [*own, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return [value.__name__]
    if isinstance(value, nn.Module):
        return [repr(value), dict(value.state_dict())]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise ConfigError(
        f"a cache needs to tell one {type(value).__name__} from another, which is not possible: "
        "keep batches and the loss function to tensors, arrays and plain values, or leave the "
        "cache out"
    )


def _inside(cell: Any) -> Any:
    """Return what a function encloses, None where it is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _feed_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


_PLAIN = str | int | float | complex | bool | None | Enum | np.generic | torch.dtype | torch.device
