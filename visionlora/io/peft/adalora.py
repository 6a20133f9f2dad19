"""PEFT's AdaLoRA.

| PEFT | here |
|---|---|
| `lora_A: r x in`, `lora_B: out x r`, `lora_E: r x 1` | `Q, P, E` |

Layers keep the scale `lora_alpha / (init_r + 1e-5)` of the rank they began with; one whose ranks
were all taken away has empty tensors and is no site here.
"""

from visionlora.io.parts import AdapterParts
from visionlora.io.peft.config import by_pattern
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
    whole_layers,
)
from visionlora.methods.adalora import AdaLoRA
from visionlora.registry import build_config

_SMALL = 1e-5
"""What is added to the rank in the scale."""


@register
class AdaLoRAMapping(Mapping):
    """ADALORA."""

    kind = "ADALORA"
    methods = ("adalora",)
    marks = ("lora_A", "lora_B", "lora_E")

    def read(self, source: Source) -> Translation:
        """Return AdaLoRA on the layers that have tensors."""
        result = Translation()
        first = int(source.config["init_r"])
        for layer, tensors in source.layers.items():
            Q, P, E = tensors["lora_A"], tensors["lora_B"], tensors["lora_E"].reshape(-1)
            rank = len(E)
            if rank == 0:
                continue
            given = by_pattern(source.option("alpha_pattern"), layer, source.config["lora_alpha"])
            alpha = float(given) if float(given) > 0 else float(first)
            config = build_config(
                "adalora",
                {
                    "rank": rank,
                    "target": float(min(rank, source.option("target_r", rank))),
                    "alpha": alpha * (rank + _SMALL) / (first + _SMALL),
                    "dropout": float(source.option("lora_dropout", 0.0)),
                    "orthogonality": float(source.option("orth_reg_weight", 0.5)),
                    "beta1": float(source.option("beta1", 0.85)),
                    "beta2": float(source.option("beta2", 0.85)),
                },
            )
            site = source.site(layer, P.shape[0], Q.shape[1], "linear")
            result.add(site, config, {"P": P, "E": E, "Q": Q})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the triples; all sites need one scale."""
        if not whole_layers(parts, "linear", "conv"):
            return None
        layers, ranks, scales = {}, {}, set()
        for entry in parts.entries:
            delta, name = entry.delta, entry.site.module
            assert isinstance(delta, AdaLoRA)
            layers[name] = {"lora_A": delta.Q, "lora_B": delta.P, "lora_E": delta.E[:, None]}
            ranks[name] = len(delta.E)
            scales.add(round(delta.scale, 12))
        if len(scales) != 1:
            return None
        rank = max(ranks.values())
        pattern = {
            f"{name}.lora_E": [True] * kept + [False] * (rank - kept)
            for name, kept in ranks.items()
        }
        options = parts.entries[0].delta.config.to_dict()
        config = {
            "peft_type": "ADALORA",
            "init_r": rank,
            "target_r": max(1, min(rank, round(options["target"]))),
            "lora_alpha": scales.pop() * (rank + _SMALL),
            "lora_dropout": 0.0,
            "total_step": 1,
            "rank_pattern": pattern if min(ranks.values()) < rank else None,
        }
        return Written(config, layers)
