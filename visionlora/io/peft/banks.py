"""PEFT's VB-LoRA and Uni-LoRA: trained vectors that all layers share.

| PEFT | here |
|---|---|
| VB-LoRA `vblora_vector_bank`; `vblora_logits_A, _B` | shared `bank`; `logits_A, logits_B` |
| Uni-LoRA `unilora_theta_d`; `unilora_indices_A, _B`, `unilora_scales_A, _B` | `theta`; `index` |

VB-LoRA files may hold only the k chosen entries of a piece and k - 1 weights; their logits are the
logarithms of the weights, and the other logits, which have no effect, are far below them.

Uni-LoRA files may leave out the index: it is drawn again as PEFT does, with NumPy's generator, and
depends on all layers and their order, which the base model gives.
"""

import numpy as np
import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    held_by_layers,
    register,
    whole_layers,
)
from visionlora.methods.uni_lora import UniLoRA, UniLoRAVector
from visionlora.methods.vb_lora import VectorBank
from visionlora.registry import build_config

_LEAST = 1e-30
"""Smallest weight of a chosen entry, so that its logit is finite."""
_FAR_BELOW = -1e4


@register
class VBLoRAMapping(Mapping):
    """VBLORA."""

    kind = "VBLORA"
    methods = ("vb-lora",)
    marks = ("vblora_vector_bank", "vblora_logits_A", "vblora_logits_B")

    def read(self, source: Source) -> Translation:
        """Return VB-LoRA on the layers that have logits."""
        result = Translation()
        bank = source.shared["vblora_vector_bank"]
        count, block = bank.shape
        rank = int(source.config["r"])
        config = build_config(
            "vb-lora",
            {
                "rank": rank,
                "bank": count,
                "block": block,
                "top_k": int(source.option("topk", 2)),
                "dropout": float(source.option("vblora_dropout", 0.0)),
            },
        )
        for layer, tensors in source.layers.items():
            values = {f"logits_{side}": _logits(tensors, side, count) for side in "AB"}
            out, width = len(values["logits_B"]) * block, values["logits_A"].shape[1] * block
            result.add(source.site(layer, out, width, "linear"), config, values)
        result.share({"bank": bank})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the bank and all logits."""
        if not whole_layers(parts, "linear"):
            return None
        layers = held_by_layers(parts, vblora_logits_A="logits_A", vblora_logits_B="logits_B")
        options, vectors = parts.entries[0].delta.config.to_dict(), parts.shared
        assert isinstance(vectors, VectorBank)
        config = {
            "peft_type": "VBLORA",
            "r": options["rank"],
            "num_vectors": options["bank"],
            "vector_length": options["block"],
            "topk": options["top_k"],
            "save_only_topk_weights": False,
        }
        return Written(config, layers, {"vblora_vector_bank": vectors.bank})


def _logits(tensors: dict[str, Tensor], side: str, count: int) -> Tensor:
    """Return the logits of one factor, whether all of them or only the chosen ones are there."""
    name = f"vblora_logits_{side}"
    if name in tensors:
        return tensors[name]
    which = tensors[f"{name}_topk_indices"].long()
    weights = tensors[f"{name}_topk_weights"]
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    logits = weights.new_full((*which.shape[:-1], count), _FAR_BELOW)
    return logits.scatter(-1, which, weights.clamp_min(_LEAST).log())


@register
class UniLoRAMapping(Mapping):
    """UNILORA."""

    kind = "UNILORA"
    methods = ("uni-lora",)
    marks = (
        "unilora_theta_d",
        "unilora_indices_A",
        "unilora_indices_B",
        "unilora_scales_A",
        "unilora_scales_B",
    )

    def read(self, source: Source) -> Translation:
        """Return Uni-LoRA on the layers that have indices, or that the configuration names."""
        result = Translation()
        theta = source.shared["unilora_theta_d"]
        rank = int(source.config["r"])
        config = build_config(
            "uni-lora",
            {
                "rank": rank,
                "length": len(theta),
                "dropout": float(source.option("unilora_dropout", 0.0)),
            },
        )
        pieces = []
        for layer, tensors in source.layers.items():
            A, B = tensors["unilora_indices_A"], tensors["unilora_indices_B"]
            result.add(source.site(layer, B.shape[0], A.shape[1], "linear"), config, {})
            pieces += [A.reshape(-1), B.reshape(-1)]
        if not pieces:
            names = source.ordered(("linear",))
            if names is None:
                raise AdapterFileError(
                    "the layers of Uni-LoRA and their order are in no file: load the adapter into "
                    "its model and save it from there"
                )
            for name in names:
                result.add(source.known_site(name), config, {})
            entries = sum(rank * (site.in_features + site.out_features) for site, _ in result.plan)
            pieces = [_drawn_again(entries, len(theta), int(source.option("proj_seed", 42)))]
        index = torch.cat(pieces).long()
        count = torch.bincount(index, minlength=len(theta)).float()
        scale = torch.where(count > 0, count.rsqrt(), torch.zeros(()))
        result.share({"theta": theta})
        result.freeze("shared", {"index": index.int(), "inverse_root": scale})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the vector, and the index of every layer, which PEFT would draw differently."""
        vector = parts.shared
        assert isinstance(vector, UniLoRAVector)
        if not whole_layers(parts, "linear") or vector.initial is not None:
            return None
        layers, rank = {}, 0
        for entry in parts.entries:
            delta, site = entry.delta, entry.site
            assert isinstance(delta, UniLoRA)
            rank = delta.options.rank
            start, first = vector.starts[delta.site.name], rank * site.in_features
            index = vector.index[start : start + first + rank * site.out_features].long()
            scale = vector.inverse_root[index].float()
            layers[site.module] = {
                "unilora_indices_A": index[:first].view(rank, -1),
                "unilora_indices_B": index[first:].view(-1, rank),
                "unilora_scales_A": scale[:first].view(rank, -1),
                "unilora_scales_B": scale[first:].view(-1, rank),
            }
        config = {
            "peft_type": "UNILORA",
            "r": rank,
            "theta_d_length": len(vector.theta),
            "save_indices": True,
        }
        return Written(config, layers, {"unilora_theta_d": vector.theta})


def _drawn_again(entries: int, length: int, seed: int) -> Tensor:
    """Return the balanced index as PEFT draws it: whole rounds, then extras, then a shuffle."""
    generator = np.random.default_rng(seed)
    index = np.repeat(np.arange(length), entries // length)
    if entries % length:
        extras = generator.choice(length, size=entries % length, replace=False)
        index = np.concatenate([index, extras])
    generator.shuffle(index)
    return torch.from_numpy(index)
