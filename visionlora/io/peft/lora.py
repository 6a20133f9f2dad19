"""PEFT's LoRA, rsLoRA and DoRA.

    lora_A: r x in (conv: r x channels x kh x kw),  lora_B: out x r (conv: out x r x 1 x 1)

An embedding has `lora_embedding_A: r x vocabulary` and `lora_embedding_B: width x r`, as ours. On
MultiheadAttention PEFT has one pair for the joint projection of q, k and v, and one for the output
(`base_layer.out_proj`); read here, the three rows get a pair each, with copies of A. PEFT 0.21 adds
the change of the output twice (its pull request 3774), merged or not; for the same function here,
the pair of the output is read with twice its scale and written with half of it.

A pair of a higher rank than its layer can have is replaced by one with the same product.

`init_lora_weights` of PiSSA, OLoRA and the like change the base weights when PEFT loads the
adapter: such files are refused.
"""

from collections.abc import Mapping as Table
from typing import Any, ClassVar

from torch import Tensor

from visionlora.config import AdapterConfig
from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts, Entry
from visionlora.io.peft.config import by_pattern, exact_pattern
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
    whole_layers,
)
from visionlora.io.plain import fitting
from visionlora.methods.dora import DoRA
from visionlora.registry import build_config
from visionlora.sites import WHOLE, Kind

ATTENTION_OUTPUT = 2.0
"""How often PEFT adds the change of the output of MultiheadAttention."""
_HARMLESS_INITS = (True, "gaussian", "orthogonal", "eva")


@register
class LoRAMapping(Mapping):
    """LORA."""

    kind = "LORA"
    methods = ("dora",)
    also = ("lora",)  # written from its factor pairs, as are all methods that PEFT lacks
    marks = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    neutral: ClassVar[Table[str, tuple[Any, ...]]] = {
        "init_lora_weights": _HARMLESS_INITS,
        **dict.fromkeys(
            (
                "lora_bias",
                "use_qalora",
                "use_bdlora",
                "kasa_config",
                "monteclora_config",
                "velora_config",
                "arrow_config",
                "alora_invocation_tokens",
                "trainable_token_indices",
                "target_parameters",
                "layer_replication",
            ),
            (),
        ),
    }

    def read(self, source: Source) -> Translation:
        """Return LoRA or DoRA on the layers that have tensors."""
        result = Translation()
        for layer, tensors in source.layers.items():
            if f"{layer}.out_proj" in source.layers:
                _read_attention(result, source, layer, tensors)
                continue
            owner, _, leaf = layer.rpartition(".")
            inside = leaf == "out_proj" and (
                owner in source.layers or source.known.site(owner, "out", "linear") is not None
            )
            kind, down, up = pair_tensors(tensors, "lora")
            site = source.site(
                owner if inside else layer,
                up.shape[0],
                down.shape[1],
                kind,
                "out" if inside else WHOLE,
                kernel_entries(tensors["lora_A"]) if kind == "conv" else 1,
            )
            rank, (up, down) = down.shape[0], fitting(up, down)
            values = {"A": down, "B": up}
            if "lora_magnitude_vector" in tensors:
                values["magnitude"] = tensors["lora_magnitude_vector"].reshape(-1)
            config = (
                _config(source, owner, rank, kind, values, ATTENTION_OUTPUT)
                if inside
                else _config(source, layer, rank, kind, values)
            )
            result.add(site, config, values)
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return DoRA's pairs and norms; no part of a layer has norms of its own in PEFT."""
        if not whole_layers(parts, "linear", "conv", "embedding"):
            return None
        layers, ranks, alphas = {}, {}, {}
        for entry in parts.entries:
            delta = entry.delta
            assert isinstance(delta, DoRA)
            magnitude: Tensor = delta.magnitude
            if entry.site.kind == "conv":
                magnitude = magnitude[None, :, None, None]
            name = entry.site.module
            layers[name] = lora_tensors(parts, entry, "lora", delta.A, delta.B) | {
                "lora_magnitude_vector": magnitude
            }
            ranks[name] = delta.A.shape[0]
            alphas[name] = entry.delta.scale * ranks[name]
        return Written(lora_config(ranks, alphas) | {"use_dora": True}, layers)


def pair_tensors(tensors: Table[str, Tensor], prefix: str) -> tuple[Kind, Tensor, Tensor]:
    """Return the kind of layer that a pair of tensors speaks of, and the pair as matrices."""
    if f"{prefix}_embedding_A" in tensors:
        return "embedding", tensors[f"{prefix}_embedding_A"], tensors[f"{prefix}_embedding_B"]
    down, up = tensors[f"{prefix}_A"], tensors[f"{prefix}_B"]
    if down.dim() not in (2, 4) or up.shape[1] != down.shape[0]:
        raise AdapterFileError(
            f"{prefix}_A of shape {tuple(down.shape)} and {prefix}_B of shape {tuple(up.shape)} "
            "are no pair for a Linear or Conv2d layer"
        )
    return ("conv" if down.dim() == 4 else "linear"), down.flatten(1), up.flatten(1)


def kernel_entries(down: Tensor) -> int:
    """Return the entries of a kernel: those behind rank and channels."""
    return down[0, 0].numel()


def lora_tensors(
    parts: AdapterParts, entry: Entry, prefix: str, down: Tensor, up: Tensor
) -> dict[str, Tensor]:
    """Return a pair of matrices in the shapes and under the names of a layer's kind."""
    if entry.site.kind == "embedding":
        return {f"{prefix}_embedding_A": down, f"{prefix}_embedding_B": up}
    if entry.site.kind == "conv":
        down = down.reshape(-1, *kernel_shape(parts, entry))
        up = up[:, :, None, None]
    return {f"{prefix}_A": down, f"{prefix}_B": up}


def kernel_shape(parts: AdapterParts, entry: Entry) -> tuple[int, ...]:
    """Return channels, height and width of a convolution's kernel.

    Raises:
        AdapterFileError: the base weights are not known, and a file holds only their product.
    """
    weight = parts.known.tensor(f"{entry.site.module}.weight")
    if weight is None:
        raise AdapterFileError(
            f"the kernel size of {entry.site.module} is not in the file: give the state dict of "
            "the base model (--base FILE.safetensors)"
        )
    return tuple(weight.shape[1:])


def lora_config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Return the configuration of a LoRA with a rank and an alpha per layer."""
    rank, alpha = max(ranks.values()), max(alphas.values(), key=list(alphas.values()).count)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(k): v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {exact_pattern(k): v for k, v in alphas.items() if v != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _config(
    source: Source,
    layer: str,
    rank: int,
    kind: str,
    values: Table[str, Tensor],
    times: float = 1.0,
) -> AdapterConfig:
    alpha = by_pattern(source.option("alpha_pattern"), layer, source.config["lora_alpha"])
    fitted, rooted = values["A"].shape[0], bool(source.option("use_rslora"))
    return build_config(
        "dora" if "magnitude" in values else "lora",
        {
            "rank": fitted,
            # The scale stays that of the nominal rank where a layer is too small for it.
            "alpha": times * float(alpha) * ((fitted / rank) ** (0.5 if rooted else 1.0)),
            "scaling": "rslora" if rooted else "standard",
            "dropout": 0.0 if kind == "embedding" else float(source.option("lora_dropout", 0.0)),
        },
    )


def _read_attention(
    result: Translation, source: Source, layer: str, tensors: Table[str, Tensor]
) -> None:
    """Add the rows of a joint projection as q, k and v."""
    down, up = tensors["lora_A"], tensors["lora_B"]
    width = up.shape[0] // 3
    for index, key in enumerate("qkv"):
        site = source.site(layer, width, down.shape[1], "linear", key)
        part, shared = fitting(up[index * width : (index + 1) * width], down)
        values = {"A": shared, "B": part}
        result.add(site, _config(source, layer, down.shape[0], "linear", values), values)
