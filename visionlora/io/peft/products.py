"""PEFT's HiRA and MiSS.

| PEFT | here |
|---|---|
| HiRA `hira_A, hira_B`, `hira_embedding_A, hira_embedding_B` | `A, B` |
| MiSS `miss_block` | `D` |

HiRA's dropout acts on a second product with the weight, which ours does not have; it is left out.
"""

from typing import Any

from visionlora.io.parts import AdapterParts
from visionlora.io.peft.config import exact_pattern
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    held_by_layers,
    register,
    whole_layers,
)
from visionlora.io.peft.pairs import kernel_entries, lora_tensors, pair_tensors
from visionlora.io.plain import fitting
from visionlora.methods.hira import HiRA
from visionlora.methods.miss import MiSS, MiSSConfig
from visionlora.registry import build_config


@register
class HiRAMapping(Mapping):
    """HIRA."""

    kind = "HIRA"
    methods = ("hira",)
    marks = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")

    def read(self, source: Source) -> Translation:
        """Return HiRA on the layers that have tensors."""
        result = Translation()
        for layer, tensors in source.layers.items():
            kind, down, up = pair_tensors(tensors, "hira")
            kernel = kernel_entries(tensors["hira_A"]) if kind == "conv" else 1
            site = source.site(layer, up.shape[0], down.shape[1], kind, kernel=kernel)
            up, down = fitting(up, down)
            config = build_config("hira", {"rank": down.shape[0]})
            result.add(site, config, {"A": down, "B": up})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the pair."""
        if not whole_layers(parts, "linear", "conv", "embedding"):
            return None
        layers, ranks = {}, {}
        for entry in parts.entries:
            delta, name = entry.delta, entry.site.module
            assert isinstance(delta, HiRA)
            layers[name] = lora_tensors(parts, entry, "hira", delta.A, delta.B)
            ranks[name] = delta.A.shape[0]
        rank = next(iter(ranks.values()))
        pattern = {exact_pattern(k): v for k, v in ranks.items() if v != rank}
        return Written({"peft_type": "HIRA", "r": rank, "rank_pattern": pattern}, layers)


@register
class MiSSMapping(Mapping):
    """MISS."""

    kind = "MISS"
    methods = ("miss",)
    marks = ("miss_block",)

    def read(self, source: Source) -> Translation:
        """Return MiSS on the layers that have tensors; their input size is not among these."""
        result = Translation()
        variant = source.option("init_weights", True)
        variant = variant if variant in ("bat", "mini") else "balance"
        for layer, tensors in source.layers.items():
            block = tensors["miss_block"]
            options = {
                "rank": block.shape[1 if variant == "bat" else 0],
                "variant": variant,
                "mini_rank": block.shape[1] if variant == "mini" else 1,
                "dropout": 0.0 if variant == "bat" else float(source.option("miss_dropout", 0.0)),
            }
            config = build_config("miss", options)
            result.add(source.known_site(layer), config, {"D": block})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the shared matrix."""
        configs = {
            (config.rank, config.variant, config.mini_rank)
            for config in (_miss(entry.delta) for entry in parts.entries)
        }
        if not whole_layers(parts, "linear") or len(configs) != 1:
            return None
        rank, variant, mini = configs.pop()
        layers = held_by_layers(parts, miss_block="D")
        config = {
            "peft_type": "MISS",
            "r": rank,
            "mini_r": mini,
            "init_weights": True if variant == "balance" else variant,
        }
        return Written(config, layers)


def _miss(delta: Any) -> MiSSConfig:
    assert isinstance(delta, MiSS)
    return delta.options
