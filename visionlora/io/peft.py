"""Writing adapters in the file format of PEFT, so that its users can load them.

Every method with a factor form is an ordinary LoRA to PEFT: the scale goes into the up-matrix, and
the row slices of one fused projection become one pair, exactly:

    A = [A_q; A_v],   B = [[s_q B_q, 0], [0, 0], [0, s_v B_v]],   alpha = r = r_q + r_v

Trained heads become `modules_to_save`. What PEFT cannot express is refused: methods without a
factor form, grouped convolutions (PEFT mixes the groups), and MultiheadAttention (PEFT has one
adapter for q, k and v together). Batch-norm statistics are no part of the format: a warning says so
where training changed them.
"""

import json
import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.errors import AdapterFileError, AdapterStateError
from visionlora.hosts import Host, find_adapter
from visionlora.hosts.base import Slot, parameter_name, stored
from visionlora.io.atomic import write_atomically, write_text_atomically
from visionlora.record import adapter_names, hosts_of

logger = logging.getLogger("visionlora")

_PREFIX = "base_model.model."


def export(
    model: nn.Module, folder: str | Path, *, format: str = "peft", name: str | None = None
) -> Path:
    """Write one adapter as `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: a model with the adapter.
        folder: where the two files go.
        format: `peft` is the only one so far.
        name: which adapter; may be omitted if there is one.

    Returns:
        The folder; `peft.PeftModel.from_pretrained(base_model, folder)` reads it.

    Raises:
        AdapterStateError: there is no such adapter, or PEFT cannot express it.
        OutputError: the folder cannot be written.
    """
    if format != "peft":
        raise AdapterFileError(f"unknown export format {format!r}; allowed: 'peft'")
    names = adapter_names(model)
    if name is None and len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    name = names[0] if name is None else find_adapter(names, name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, host in hosts_of(model).items():
        if name in host.adapters:
            up, down = _pair(path, host, name)
            tensors |= _layer_tensors(path, host, up, down)
            ranks[path] = down.shape[0]
    heads = _trained_modules(model)
    for head in heads:
        module = model.get_submodule(head)
        tensors |= {f"{_PREFIX}{head}.{key}": item for key, item in module.state_dict().items()}
    buffers = [key for key in record.changed_buffers(model) if key.rpartition(".")[0] not in heads]
    if buffers:
        logger.warning(
            "PEFT's format has no place for %d buffers that training changed, such as %s",
            len(buffers),
            buffers[0],
        )
    folder = Path(folder)
    data = safetensors.torch.save(
        {key: item.detach().contiguous().cpu() for key, item in tensors.items()}, {"format": "pt"}
    )
    write_atomically(folder / "adapter_model.safetensors", lambda path: _write_bytes(path, data))
    write_text_atomically(
        folder / "adapter_config.json", json.dumps(_config(ranks, heads), indent=2)
    )
    return folder


def _pair(path: str, host: Host, name: str) -> tuple[Tensor, Tensor]:
    """Return the stacked factors of all sites of a layer, scale included."""
    slots = [
        Slot(key, host.state.sites[name][key].rows, delta, host.state.strengths[name])
        for key, delta in host.adapters[name].items()  # type: ignore[operator]
    ]
    if isinstance(host, nn.MultiheadAttention):
        raise AdapterStateError(
            f"{path} is a MultiheadAttention, whose separate q, k, v PEFT lacks"
        )
    if getattr(host, "groups", 1) != 1:
        raise AdapterStateError(f"{path} is a grouped convolution, which PEFT adapts differently")
    ups, downs = [], []
    for slot in slots:
        factors = slot.delta.factors()
        if factors is None:
            raise AdapterStateError(
                f"{path}: {slot.delta.config.method} has no factor form, so it is no LoRA to PEFT"
            )
        up, down = factors
        total = stored(host, parameter_name(host, slot.key)).shape[0]
        start, stop = slot.rows or (0, up.shape[0])
        whole = up.new_zeros(up.shape[0] if slot.rows is None else total, up.shape[1])
        whole[start:stop] = slot.scale * up.detach()
        ups.append(whole)
        downs.append(down.detach().repeat(1, slot.delta.fold))
    return torch.cat(ups, dim=1), torch.cat(downs)


def _layer_tensors(path: str, host: Host, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    prefix = f"{_PREFIX}{path}."
    if isinstance(host, nn.Embedding):
        return {f"{prefix}lora_embedding_A": down, f"{prefix}lora_embedding_B": up}
    if isinstance(host, nn.Conv2d):
        kernel = stored(host, "weight").shape[1:]
        down, up = down.reshape(-1, *kernel), up[:, :, None, None]
    return {f"{prefix}lora_A.weight": down, f"{prefix}lora_B.weight": up}


def _trained_modules(model: nn.Module) -> list[str]:
    """Return the modules whose own parameters are trained."""
    names = [name for name, item in record.base_parameters(model) if item.requires_grad]
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if "" in owners:
        raise AdapterStateError(f"PEFT saves whole modules, but {names[0]} belongs to the root")
    return owners


def _config(ranks: dict[str, int], heads: list[str]) -> dict[str, Any]:
    largest = max(ranks.values())
    other = {path: rank for path, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
