"""PEFT's LoHa and LoKr.

| PEFT | here |
|---|---|
| LoHa `hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b` | `B1, A1, B2, A2` |
| LoKr `lokr_w1, lokr_w2` or `lokr_w2_a, lokr_w2_b` | `w1, w2` or `w2_a, w2_b` |

Convolutions in core form (`use_effective_conv2d`) have a small kernel between two factors; it is
multiplied into the down factor here, which is the same function with more trained values. So is
LoKr's `decompose_both`, whose factors of w1 are multiplied. PEFT's dropouts of whole rows and
modules act in training only and are left out.
"""

from typing import Any

import torch
from torch import Tensor

from visionlora.io.parts import AdapterParts
from visionlora.io.peft.config import by_pattern, exact_pattern
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
    whole_layers,
)
from visionlora.io.peft.pairs import kernel_entries, kernel_shape
from visionlora.methods.loha import LoHa
from visionlora.methods.lokr import LoKr, LoKrConfig
from visionlora.registry import build_config
from visionlora.sites import Kind


def _rank_and_alpha(source: Source, layer: str) -> dict[str, Any]:
    return {
        "rank": int(by_pattern(source.option("rank_pattern"), layer, source.config["r"])),
        "alpha": float(by_pattern(source.option("alpha_pattern"), layer, source.config["alpha"])),
    }


def _patterns(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exact_pattern(k): v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {exact_pattern(k): v for k, v in alphas.items() if v != alpha},
        "init_weights": True,
        "use_effective_conv2d": False,
    }


def _down_of_core(core: Tensor, down: Tensor) -> Tensor:
    """Multiply the core `r x r x kh x kw` and `r x channels` into `r x (channels kh kw)`."""
    return torch.einsum("ijkl,jc->ickl", core, down).flatten(1)


@register
class LoHaMapping(Mapping):
    """LOHA."""

    kind = "LOHA"
    methods = ("loha",)
    marks = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def read(self, source: Source) -> Translation:
        """Return LoHa on the layers that have tensors."""
        result = Translation()
        for layer, tensors in source.layers.items():
            values: dict[str, Tensor] = {}
            for index in "12":
                up, down = tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"]
                if f"hada_t{index}" in tensors:
                    up, down = up.t(), _down_of_core(tensors[f"hada_t{index}"], down)
                values |= {f"B{index}": up, f"A{index}": down}
            up, down = values["B1"], values["A1"]
            core = tensors.get("hada_t1")
            site = source.site(
                layer,
                up.shape[0],
                down.shape[1],
                "linear" if core is None else "conv",
                kernel=1 if core is None else kernel_entries(core),
            )
            result.add(site, build_config("loha", _rank_and_alpha(source, layer)), values)
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the two pairs."""
        if not whole_layers(parts, "linear", "conv", groups=True):
            return None
        layers, ranks, alphas = {}, {}, {}
        for entry in parts.entries:
            delta, name = entry.delta, entry.site.module
            assert isinstance(delta, LoHa)
            layers[name] = {
                "hada_w1_a": delta.B1,
                "hada_w1_b": delta.A1,
                "hada_w2_a": delta.B2,
                "hada_w2_b": delta.A2,
            }
            ranks[name] = delta.A1.shape[0]
            alphas[name] = delta.scale * ranks[name]
        return Written({"peft_type": "LOHA", **_patterns(ranks, alphas)}, layers)


@register
class LoKrMapping(Mapping):
    """LOKR."""

    kind = "LOKR"
    methods = ("lokr",)
    marks = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def read(self, source: Source) -> Translation:
        """Return LoKr on the layers that have tensors."""
        result = Translation()
        factor = int(source.option("decompose_factor", -1))
        for layer, tensors in source.layers.items():
            first = tensors.get("lokr_w1")
            if first is None:
                first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
            values, second, kernel = {"w1": first}, tensors.get("lokr_w2"), 1
            if second is not None:
                kernel = kernel_entries(second) if second.dim() == 4 else 1
                values["w2"] = second.flatten(1)
                height, width = values["w2"].shape
            else:
                up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
                if "lokr_t2" in tensors:
                    core = tensors["lokr_t2"]
                    up, down, kernel = up.t(), _down_of_core(core, down), kernel_entries(core)
                values |= {"w2_a": up, "w2_b": down}
                height, width = up.shape[0], down.shape[1]
            out, columns = first.shape[0] * height, first.shape[1] * width
            kind: Kind = "linear" if kernel == 1 else "conv"
            site = source.site(layer, out, columns, kind, kernel=kernel)
            options = {**_rank_and_alpha(source, layer), "factor": None if factor < 1 else factor}
            result.add(site, build_config("lokr", options), values)
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the parts of the product."""
        factors = {_lokr(entry.delta).factor for entry in parts.entries}
        if not whole_layers(parts, "linear", "conv", groups=True) or len(factors) != 1:
            return None
        layers, ranks, alphas = {}, {}, {}
        for entry in parts.entries:
            delta, name = entry.delta, entry.site.module
            tensors = {f"lokr_{key}": item for key, item in delta.named_parameters()}
            if entry.site.kind == "conv" and "lokr_w2" in tensors:
                kernel = kernel_shape(parts, entry)[1:]
                tensors["lokr_w2"] = tensors["lokr_w2"].unflatten(1, (-1, *kernel))
            layers[name] = tensors
            ranks[name] = _lokr(delta).rank
            alphas[name] = delta.scale * ranks[name]
        config = {
            "peft_type": "LOKR",
            "decompose_both": False,
            "decompose_factor": factors.pop() or -1,
            **_patterns(ranks, alphas),
        }
        return Written(config, layers)


def _lokr(delta: Any) -> LoKrConfig:
    assert isinstance(delta, LoKr)
    return delta.options
