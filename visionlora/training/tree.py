"""Nested state (dicts, lists, numbers, tensors) in one safetensors file, without pickle.

Tensors go to the tensor section. Everything else goes to the metadata as JSON, in which a
tensor, a tuple and a dict with non-string keys are marked by a one-key object:
`{"$tensor": "3"}`, `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from visionlora.io.atomic import write_atomically

Tensors = dict[str, torch.Tensor]


def write_tree(path: Path, tree: Any) -> None:
    """Write `tree` to `path`, completely or not at all.

    Raises:
        TypeError: the tree holds something else than containers, plain values and tensors.
        OutputError: the file cannot be written.
    """
    tensors: Tensors = {}
    text = json.dumps(_pack(tree, tensors))
    data = save(tensors, metadata={"tree": text})
    write_atomically(path, lambda temporary: _write(temporary, data))


def read_tree(path: Path) -> Any:
    """Return the tree in `path`, its tensors on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _unpack(json.loads(file.metadata()["tree"]), tensors)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _pack(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, np.ndarray):
        # Only random states of numpy are arrays; uint32 does not exist everywhere, int64 does.
        value = torch.from_numpy(value.astype(np.int64))
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"$tensor": key}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        pairs = [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]
        return {"$dict": pairs}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint")


def _unpack(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["$dict"]}
    return {key: _unpack(item, tensors) for key, item in value.items()}
