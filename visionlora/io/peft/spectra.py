"""PEFT's FourierFT, TinyLoRA and LayerNorm tuning.

| PEFT | here |
|---|---|
| FourierFT `fourierft_spectrum` | `c`; positions follow from `random_loc_seed` in both |
| TinyLoRA `tinylora_v.<group>`; `tinylora_A, _B, _P` | shared `v`; frozen `A, B, P` |
| LN tuning `ln_tuning_layers.weight, .bias` | `g, d`: the differences to the base |

TinyLoRA's vectors belong to groups of consecutive layers, so the order of the layers counts; where
there is more than one group it is that of the base model. P is drawn again as PEFT does
(`projection_seed` plus the layer's number) if it is not in the file. On an embedding PEFT
decomposes the table, whose transpose is our view: A and B change places, and every P is transposed.
"""

from typing import Any

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts, Entry, needs_base
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
    whole_layers,
)
from visionlora.methods.fourier_ft import FourierFT
from visionlora.methods.tiny_lora import TinyLoRA, TinyVectors
from visionlora.registry import build_config


@register
class FourierFTMapping(Mapping):
    """FOURIERFT."""

    kind = "FOURIERFT"
    methods = ("fourier-ft",)
    marks = ("fourierft_spectrum",)

    def read(self, source: Source) -> Translation:
        """Return FourierFT on the layers that have tensors; their size is not among these."""
        result = Translation()
        for layer, tensors in source.layers.items():
            spectrum = tensors["fourierft_spectrum"]
            options = {
                "coefficients": len(spectrum),
                "scale": float(source.config["scaling"]),
                "seed": int(source.config["random_loc_seed"]),
            }
            config = build_config("fourier-ft", options)
            result.add(source.known_site(layer), config, {"c": spectrum})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the spectra."""
        deltas = [entry.delta for entry in parts.entries]
        found = {
            (delta.options.seed, delta.scale) for delta in deltas if isinstance(delta, FourierFT)
        }
        if not whole_layers(parts, "linear") or len(found) != 1:
            return None
        seed, scale = found.pop()
        layers: dict[str, dict[str, Tensor]] = {}
        counts = {}
        for entry in parts.entries:
            assert isinstance(entry.delta, FourierFT)
            layers[entry.site.module] = {"fourierft_spectrum": entry.delta.c}
            counts[entry.site.module] = len(entry.delta.c)
        count = next(iter(counts.values()))
        if len(set(counts.values())) > 1 and any(
            one.endswith(f".{other}") for one in counts for other in counts
        ):
            return None  # PEFT would take one layer's pattern for the other's
        config = {
            "peft_type": "FOURIERFT",
            "n_frequency": count,
            "n_frequency_pattern": {k: v for k, v in counts.items() if v != count},
            "scaling": scale,
            "random_loc_seed": seed,
        }
        return Written(config, layers)


@register
class TinyLoRAMapping(Mapping):
    """TINYLORA."""

    kind = "TINYLORA"
    methods = ("tiny-lora",)
    marks = ("tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P")

    def read(self, source: Source) -> Translation:
        """Return TinyLoRA on the layers that have tensors, in the order of the model."""
        result = Translation()
        tying = float(source.option("weight_tying", 0.0))
        v = [source.shared[f"tinylora_v.{index}"] for index in range(len(source.shared))]
        order = source.ordered(("linear", "embedding")) or list(source.layers)
        saved = all("tinylora_P" in tensors for tensors in source.layers.values())
        if source.known.layers() is None and (len(v) > 1 or not saved):
            raise AdapterFileError(
                "the order of the layers, which TinyLoRA depends on, is in no file: load the "
                "adapter into its model and save it from there"
            )
        ranks = {len(tensors["tinylora_A"]) for tensors in source.layers.values()}
        if len(ranks) != 1:
            raise AdapterFileError(
                f"TinyLoRA with several ranks ({sorted(ranks)}), as PEFT makes it for layers "
                "smaller than r, is not supported"
            )
        rank, count = ranks.pop(), len(v[0])
        options = {
            "rank": rank,
            "coefficients": count,
            "weight_tying": tying,
            "dropout": 0.0,
        }
        config = build_config("tiny-lora", options)
        layers = source.known.layers() or {}
        for index, layer in enumerate(order):
            tensors = source.layers[layer]
            down, up, core = tensors["tinylora_A"], tensors["tinylora_B"], tensors.get("tinylora_P")
            if core is None:
                seed = int(source.option("projection_seed", 42)) + index
                core = torch.empty(count, rank, rank).normal_(
                    0.0, rank**-0.5, generator=torch.Generator("cpu").manual_seed(seed)
                )
            kind = layers.get(layer, "linear")
            if kind == "embedding":
                down, up, core = up.t(), down.t(), core.mT
            site = source.site(layer, up.shape[0], down.shape[1], kind)
            result.add(site, config, {})
            frozen = {"A": down, "B": up, "P": core}
            result.freeze(site.name, {key: item.contiguous() for key, item in frozen.items()})
        result.share({"v": torch.stack(v)})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the vectors and everything frozen."""
        if not whole_layers(parts, "linear", "embedding"):
            return None
        layers: dict[str, dict[str, Tensor]] = {}
        for entry in parts.entries:
            delta = entry.delta
            assert isinstance(delta, TinyLoRA)
            down, up, core = delta.A, delta.B, delta.P
            if entry.site.kind == "embedding":
                down, up, core = up.t(), down.t(), core.mT
            layers[entry.site.module] = {
                "tinylora_A": down,
                "tinylora_B": up,
                "tinylora_P": core,
            }
        vectors, options = parts.shared, parts.entries[0].delta.config.to_dict()
        assert isinstance(vectors, TinyVectors)
        config = {
            "peft_type": "TINYLORA",
            "r": options["rank"],
            "u": options["coefficients"],
            "weight_tying": options["weight_tying"],
            "save_projection": True,
        }
        shared = {f"tinylora_v.{index}": v for index, v in enumerate(vectors.v)}
        return Written(config, layers, shared)


@register
class NormMapping(Mapping):
    """LN_TUNING: whole norms, where ours holds differences."""

    kind = "LN_TUNING"
    methods = ("norm",)
    marks = ("ln_tuning_layers",)

    def read(self, source: Source) -> Translation:
        """Return norm tuning on the layers that have tensors."""
        result = Translation()
        config = build_config("norm", {})
        for layer, tensors in source.layers.items():
            site = source.known_site(layer, "norm")
            base = {key: source.known.tensor(f"{layer}.{key}") for key in ("weight", "bias")}
            values = {"g": tensors["ln_tuning_layers"] - _given(base["weight"], layer)}
            if "ln_tuning_layers.bias" in tensors:
                values["d"] = tensors["ln_tuning_layers.bias"] - _given(base["bias"], layer)
            result.add(site, config, values)
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the changed norms."""
        layers = {}
        for entry in parts.entries:
            whole = {"ln_tuning_layers.weight": _changed(parts, entry, "weight")}
            if entry.delta.bias_change() is not None:
                whole["ln_tuning_layers.bias"] = _changed(parts, entry, "bias")
            layers[entry.site.module] = whole
        return Written({"peft_type": "LN_TUNING"}, layers)


def _given(value: Tensor | None, layer: str) -> Tensor:
    if value is None:
        raise AdapterFileError(f"the base model has no such norm as {layer}")
    return value


def _changed(parts: AdapterParts, entry: Entry, leaf: str) -> Tensor:
    base = parts.known.tensor(f"{entry.site.module}.{leaf}")
    if base is None:
        raise needs_base(entry)
    change: Any = entry.delta.bias_change() if leaf == "bias" else parts.change(entry).reshape(-1)
    return base + (entry.strength * change if leaf == "bias" else change)
