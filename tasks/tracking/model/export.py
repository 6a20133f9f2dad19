"""Writing a trained tracker in the format of LoRAT's published files (`released.py` reads them).

The official code has one rank for all layers and one alpha for the model. Where s differs between
layers, their B takes the difference; what an initialiser took off a weight is part of the factors.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tasks.tracking.model import keys
from tasks.tracking.model.keys import Layout
from tasks.tracking.model.lorat import LoRAT
from visionlora.errors import ConfigError
from visionlora.io.atomic import write_atomically
from visionlora.record import adapter_names, hosts_of


@torch.no_grad()
def write_released(model: LoRAT, path: str | Path) -> Path:
    """Write types, head and adapter; `lora_alpha` and `use_rslora` as full files have them.

    Raises:
        ConfigError: an adapter that is no plain LoRA of one rank on every adapted layer.
        OutputError: the file cannot be written.
    """
    layout = layout_of(model)
    tensors: dict[str, Tensor] = {
        theirs: model.get_parameter(keys.our_name(theirs))
        for theirs in keys.trained_shapes(layout.width)
    }
    names = adapter_names(model)
    if len(names) > 1:
        raise ConfigError(f"LoRAT's format holds one adapter; this tracker has {', '.join(names)}")
    if names:
        tensors |= _adapter(model, layout)
    data = safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    )
    return write_atomically(path, lambda temporary: _write(temporary, data))


def layout_of(model: LoRAT) -> Layout:
    """Return what decides the names and shapes of a tracker's file."""
    mlp = model.blocks[0].mlp
    return Layout(
        width=model.embedding.types.shape[1],
        depth=len(model.blocks),
        into=mlp.fc1.out_features,
        out_of=mlp.fc2.in_features,
        grid=model.shape.search_grid,
    )


def _adapter(model: LoRAT, layout: Layout) -> dict[str, Tensor]:
    """Return the factors of every adapted layer, and the numbers that make up s."""
    slots = {
        (path, slot.key): slot
        for path, host in hosts_of(model).items()
        for slot in host.all_slots()
    }
    layers = keys.adapted_layers(layout)
    methods = sorted({slot.delta.config.method for slot in slots.values()})
    if methods != ["lora"]:
        raise ConfigError(
            f"LoRAT's format holds LoRA alone, not {', '.join(methods) or 'an inactive adapter'}; "
            "save the tracker in this project's format"
        )
    if slots.keys() != {(layer.module, layer.key) for layer in layers}:
        raise ConfigError("LoRAT's format has LoRA on every linear layer of the blocks")
    common = slots[layers[0].module, layers[0].key].scale
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for layer in layers:
        slot = slots[layer.module, layer.key]
        factors = slot.delta.factors()
        assert factors is not None  # LoRA is a pair
        up, down = factors
        ranks.add(len(down))
        tensors[f"{layer.theirs}.lora.A"] = down
        tensors[f"{layer.theirs}.lora.B"] = up if slot.scale == common else up * slot.scale / common
    if len(ranks) > 1:
        raise ConfigError(f"LoRAT's format has one rank for all layers; here are {sorted(ranks)}")
    alpha = torch.tensor(common * ranks.pop(), dtype=torch.float32)
    return tensors | {"lora_alpha": alpha, "use_rslora": torch.tensor(False)}


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
