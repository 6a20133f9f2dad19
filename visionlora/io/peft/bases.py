"""PEFT's VeRA and RandLoRA: one frozen pair of random matrices for the whole model.

| PEFT | here |
|---|---|
| VeRA `vera_lambda_b, vera_lambda_d`; `vera_A, vera_B` | `b, d`; frozen `A, B` |
| RandLoRA `randlora_lambda, randlora_gamma` | `Lambda, Gamma` (layout `peft`) |
| RandLoRA `randlora_A: r x 1 x m`, `randlora_B: M x N x r` | frozen `A: r x m`, `B: M x N r` |

The random matrices are taken from the file. Without them VeRA's are drawn again as PEFT does (one
generator, A first, uniform in +-sqrt(6 / fan_in)); RandLoRA's are not, because PEFT draws them in a
precision that depends on the machine.
"""

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
from visionlora.methods.base import uniform
from visionlora.methods.rand_lora import RandLoRA, RandLoRABases
from visionlora.methods.vera import VeRABases
from visionlora.registry import build_config
from visionlora.sites import Site


@register
class VeRAMapping(Mapping):
    """VERA."""

    kind = "VERA"
    methods = ("vera",)
    marks = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")

    def read(self, source: Source) -> Translation:
        """Return VeRA on the layers that have tensors; their input size is not among these."""
        result = Translation()
        layers = {name: items for name, items in source.layers.items() if "vera_lambda_b" in items}
        rank = len(next(iter(layers.values()))["vera_lambda_d"])
        config = build_config(
            "vera",
            {
                "rank": rank,
                "d_initial": float(source.option("d_initial", 0.1)),
                "dropout": float(source.option("vera_dropout", 0.0)),
            },
        )
        for layer, tensors in layers.items():
            values = {"b": tensors["vera_lambda_b"], "d": tensors["vera_lambda_d"]}
            result.add(source.known_site(layer), config, values)
        if "vera_A" in source.shared:
            bases = {"A": source.shared["vera_A"], "B": source.shared["vera_B"]}
        else:
            seed = int(source.option("projection_prng_key", 0))
            bases = _drawn_again(rank, [site for site, _ in result.plan], seed)
        result.freeze("shared", bases)
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the vectors and the frozen pair."""
        if not whole_layers(parts, "linear"):
            return None
        layers = held_by_layers(parts, vera_lambda_b="b", vera_lambda_d="d")
        bases = parts.shared
        assert isinstance(bases, VeRABases)
        config = {"peft_type": "VERA", "r": bases.A.shape[0], "save_projection": True}
        return Written(config, layers, {"vera_A": bases.A, "vera_B": bases.B})


def _drawn_again(rank: int, sites: list[Site], seed: int) -> dict[str, Tensor]:
    """Return VeRA's pair as PEFT draws it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    widest = max(site.in_features for site in sites)
    tallest = max(site.out_features for site in sites)
    A = uniform((rank, widest), (6 / widest) ** 0.5, generator)
    return {"A": A, "B": uniform((tallest, rank), (6 / rank) ** 0.5, generator)}


@register
class RandLoRAMapping(Mapping):
    """RANDLORA."""

    kind = "RANDLORA"
    methods = ("rand-lora",)
    marks = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")

    def read(self, source: Source) -> Translation:
        """Return RandLoRA on the layers that have tensors."""
        if "randlora_A" not in source.shared:
            raise AdapterFileError(
                "the random bases of RandLoRA are not in the file, and PEFT draws them in a "
                "precision that depends on the machine: save again with save_projection=True"
            )
        result = Translation()
        basis = source.shared["randlora_A"].squeeze(1)
        options = {
            "rank": basis.shape[0],
            "alpha": float(source.config["randlora_alpha"]),
            "layout": "peft",
            "dropout": float(source.option("randlora_dropout", 0.0)),
        }
        config = build_config("rand-lora", options)
        for layer, tensors in source.layers.items():
            values = {"Lambda": tensors["randlora_lambda"], "Gamma": tensors["randlora_gamma"]}
            result.add(source.known_site(layer), config, values)
        frozen = {"A": basis, "B": source.shared["randlora_B"].flatten(1)}
        result.freeze("shared", {key: item.float() for key, item in frozen.items()})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the diagonals and the bases; the layout of the paper is another function there."""
        deltas = [entry.delta for entry in parts.entries]
        layouts = {delta.options.layout for delta in deltas if isinstance(delta, RandLoRA)}
        if not whole_layers(parts, "linear") or layouts != {"peft"}:
            return None
        layers = held_by_layers(parts, randlora_lambda="Lambda", randlora_gamma="Gamma")
        bases = parts.shared
        assert isinstance(bases, RandLoRABases)
        rank = bases.A.shape[0]
        config = {
            "peft_type": "RANDLORA",
            "r": rank,
            "randlora_alpha": deltas[0].scale * rank,
            "save_projection": True,
        }
        shared = {"randlora_A": bases.A[:, None], "randlora_B": bases.B.unflatten(1, (-1, rank))}
        return Written(config, layers, shared)
