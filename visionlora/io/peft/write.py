"""Writing adapters in the file format of PEFT, so that its users can load them.

A method that PEFT has too keeps its form where PEFT can hold it; anything else becomes a plain
LoRA. The pairs of the slices of one layer become one pair of their joint rank, exactly:

    A = [A_q; A_v],   B = [[s_q B_q, 0], [0, 0], [0, s_v B_v]],   alpha = r = r_q + r_v

On MultiheadAttention PEFT has one rank for the joint projection and the output, so the smaller pair
is filled up with zeros. Trained heads become `modules_to_save`, biases of adapted layers stay with
them. Refused are plain pairs on grouped convolutions, where PEFT mixes the groups. Batch-norm
statistics of adapted or unsaved layers are no part of the format: a warning says so.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from visionlora.errors import AdapterStateError
from visionlora.io import contents
from visionlora.io.atomic import write_atomically, write_text_atomically
from visionlora.io.parts import AdapterParts
from visionlora.io.peft.config import CONFIG, PREFIX, TENSORS, exact_targets
from visionlora.io.peft.mapping import Written, mapping_of
from visionlora.io.peft.pairs import ATTENTION_OUTPUT, lora_config, lora_tensors
from visionlora.io.peft.stack import stacked
from visionlora.io.plain import Pair, PlainAdapter, flatten, scaled

logger = logging.getLogger("visionlora")

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def write_peft(
    parts: AdapterParts, folder: str | Path, rank: int | None = None
) -> tuple[str, PlainAdapter | None]:
    """Write the two files of a PEFT adapter.

    Returns:
        PEFT's name of the method, and the pairs if the adapter was written as plain LoRA.

    Raises:
        AdapterStateError: PEFT has no place for a part of it.
        AdapterFileError: base weights are needed that are not known.
    """
    mapping = mapping_of(next(iter(parts.methods))) if len(parts.methods) == 1 else None
    written = mapping.write(parts) if mapping is not None and rank is None else None
    plain, heads = None, parts.heads
    if written is None:
        plain = flatten(parts, rank)
        written, heads = _as_lora(parts, plain), plain.heads
    config = {
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "modules_to_save": None,
        "target_modules": exact_targets(written.layers),
        **written.config,
    }
    tensors = {
        f"{PREFIX}{layer}.{name}{_suffix(name, config)}": item
        for layer, items in written.layers.items()
        for name, item in items.items()
    }
    tensors |= {f"base_model.{name}": item for name, item in written.shared.items()}
    tensors |= _heads(parts, heads, config, written)
    contents.refuse_non_finite(
        {key: item for key, item in tensors.items() if "logits" not in key}, "cannot write"
    )
    folder = Path(folder)
    data = safetensors.torch.save(
        {key: item.detach().contiguous().cpu().clone() for key, item in tensors.items()},
        {"format": "pt"},
    )
    write_atomically(folder / TENSORS, lambda path: _write_bytes(path, data))
    write_text_atomically(folder / CONFIG, json.dumps(config, indent=2))
    return str(config["peft_type"]), plain


def _suffix(name: str, config: dict[str, Any]) -> str:
    """PEFT keeps these tensors in Linear and Conv2d layers of their own."""
    held = config["peft_type"] == "LORA" and name in ("lora_A", "lora_B")
    return ".weight" if held or name.startswith("oft_") else ""


def _as_lora(parts: AdapterParts, plain: PlainAdapter) -> Written:
    """Return one LoRA pair per layer."""
    groups: dict[str, list[Pair]] = {}
    for pair in plain.pairs:
        groups.setdefault(pair.site.module, []).append(pair)
    if not groups:
        raise AdapterStateError(
            "the adapter changes no weight matrix, and PEFT's LoRA cannot be without one"
        )
    entries = {entry.site.name: entry for entry in parts.entries}
    layers: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, pairs in groups.items():
        site = pairs[0].site
        if site.groups != 1:
            raise AdapterStateError(
                f"{layer} is a grouped convolution, which PEFT adapts differently; "
                "format='lora' writes it exactly"
            )
        if _is_attention(parts, layer, pairs):
            joint, output = _attention_pairs(parts, layer, pairs)
            ranks[layer] = joint[1].shape[0]
            alphas[layer] = float(ranks[layer])
            layers[layer] = {"lora_A": joint[1], "lora_B": joint[0]}
            layers[f"{layer}.base_layer.out_proj"] = {"lora_A": output[1], "lora_B": output[0]}
            continue
        scale = pairs[0].scale
        if len(pairs) == 1 and site.rows is None:
            up, down = pairs[0].up, pairs[0].down
        else:
            up, down = stacked(parts, layer, pairs)
            scale = 1.0
        ranks[layer] = down.shape[0]
        alphas[layer] = scale * ranks[layer]
        layers[layer] = lora_tensors(parts, entries[site.name], "lora", down, up)
    return Written(lora_config(ranks, alphas) | {"target_modules": exact_targets(groups)}, layers)


def _is_attention(parts: AdapterParts, layer: str, pairs: list[Pair]) -> bool:
    return (
        parts.known.tensor(f"{layer}.in_proj_weight") is not None
        or parts.known.tensor(f"{layer}.q_proj_weight") is not None
        or any(pair.site.key == "out" for pair in pairs)
    )


def _attention_pairs(
    parts: AdapterParts, layer: str, pairs: list[Pair]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the pairs of the joint projection and of the output, of equal rank."""
    if parts.known.tensor(f"{layer}.q_proj_weight") is not None:
        raise AdapterStateError(
            f"{layer} projects q, k and v from different widths, which PEFT does not support; "
            "format='lora' writes it exactly"
        )
    width = pairs[0].site.out_features
    like = pairs[0].up
    empty = (like.new_zeros(width, 0), like.new_zeros(0, width))
    inner = [pair for pair in pairs if pair.site.key != "out"]
    outer = [scaled(pair) for pair in pairs if pair.site.key == "out"]
    joint = stacked(parts, layer, inner) if inner else (like.new_zeros(3 * width, 0), empty[1])
    output = (outer[0].up / ATTENTION_OUTPUT, outer[0].down) if outer else empty
    rank = max(joint[1].shape[0], output[1].shape[0])
    return _padded(*joint, rank), _padded(*output, rank)


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - down.shape[0]
    return (
        torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1),
        torch.cat([down, down.new_zeros(more, down.shape[1])]),
    )


def _heads(
    parts: AdapterParts, heads: dict[str, Tensor], config: dict[str, Any], written: Written
) -> dict[str, Tensor]:
    """Return trained base tensors by PEFT's names, and name their modules in the configuration."""
    tensors: dict[str, Tensor] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    lost = []
    for name, item in heads.items():
        owner, _, leaf = name.rpartition(".")
        adapted = next(
            (layer for layer in written.layers if owner == layer or owner == f"{layer}.out_proj"),
            None,
        )
        if adapted is None:
            saved.setdefault(owner, {})[leaf] = item
        elif leaf in ("bias", "in_proj_bias"):
            inner = ".base_layer" if owner == adapted else ".base_layer.out_proj.base_layer"
            tensors[f"{PREFIX}{adapted}{inner}.{leaf}"] = item
            config["bias"] = "lora_only" if config["peft_type"] == "LORA" else "none"
        else:
            raise AdapterStateError(
                f"{name} is trained and {adapted} is adapted: PEFT has no place for both"
            )
    trained = [owner for owner, items in saved.items() if set(items) - _STATISTICS]
    if "" in trained:
        raise AdapterStateError(
            f"PEFT saves whole modules, but {next(iter(saved['']))} belongs to the root"
        )
    for owner in list(trained):
        for other in parts.known.ending(owner):  # PEFT saves these too, so it expects them
            saved.setdefault(other, {})
            trained += [other] if other not in trained else []
    _refuse_overlap(trained, written)
    for owner, items in saved.items():
        if owner in trained:
            whole = {**parts.known.complete(owner), **items}
            tensors |= {f"{PREFIX}{owner}.{leaf}": item for leaf, item in whole.items()}
        else:
            lost += [f"{owner}.{leaf}" for leaf in items]
    if lost:
        logger.warning(
            "PEFT's format has no place for %d buffers that training changed, such as %s",
            len(lost),
            lost[0],
        )
    config["modules_to_save"] = trained or None
    return tensors


def _refuse_overlap(trained: list[str], written: Written) -> None:
    """Refuse an adapted layer that PEFT would take for a trained head, or inside of one."""
    for owner in trained:
        for layer in written.layers:
            if re.match(rf"(^|.*\.){re.escape(owner)}($|\..*)", layer):
                raise AdapterStateError(
                    f"{layer} is adapted and {owner} is trained: PEFT, which knows heads by the "
                    "end of their names, has no place for both"
                )


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
