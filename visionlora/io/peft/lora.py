"""PEFT's LoRA, rsLoRA and DoRA.

    lora_A: r x in (conv: r x channels x kh x kw),  lora_B: out x r (conv: out x r x 1 x 1)

An embedding has `lora_embedding_A: r x vocabulary` and `lora_embedding_B: width x r`, as ours. On
MultiheadAttention PEFT has one pair for the joint projection of q, k and v, and one for the output
(`base_layer.out_proj`); read here, the three rows get a pair each, with copies of A. PEFT 0.21 adds
the change of the output twice (its pull request 3774), merged or not; for the same function here,
the pair of the output is read with twice its scale and written with half of it.

A pair of a higher rank than its layer can have is replaced by one with the same product.

Where `init_lora_weights` is `pissa` or `olora`, PEFT computes the initial pair from the base weight
whenever it loads the file, and takes it off that weight. Here it becomes the constant pair that is
taken off the change, so the weights of the base model must be known. PEFT has these for Linear
layers only. Other values that change the base (`pissa_niter_4`, `corda`,
`loftq`, `lora_ga`) depend on chance, data or precision beside the weight: they are refused.
"""

from collections.abc import Mapping as Table
from typing import Any, ClassVar

import torch
from torch import Tensor

from visionlora.config import AdapterConfig
from visionlora.errors import AdapterFileError
from visionlora.init.base import Given
from visionlora.io.parts import AdapterParts, Entry
from visionlora.io.peft.config import by_pattern
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
)
from visionlora.io.peft.pairs import (
    ATTENTION_OUTPUT,
    kernel_entries,
    lora_config,
    lora_tensors,
    pair_tensors,
)
from visionlora.io.peft.stack import stacked
from visionlora.io.plain import Pair, fitting
from visionlora.methods.dora import DoRA
from visionlora.registry import build_config, build_initialiser
from visionlora.sites import WHOLE, Site

_HARMLESS_INITS = (True, "gaussian", "orthogonal", "eva")
_RESIDUAL_INITS = ("pissa", "olora")


@register
class LoRAMapping(Mapping):
    """LORA."""

    kind = "LORA"
    methods = ("dora",)
    also = ("lora",)  # written from its factor pairs, as are all methods that PEFT lacks
    marks = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    neutral: ClassVar[Table[str, tuple[Any, ...]]] = {
        "init_lora_weights": (*_HARMLESS_INITS, *_RESIDUAL_INITS),
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
                _check_residual(source, layer, plain=False)
                _read_attention(result, source, layer, tensors)
                continue
            owner, _, leaf = layer.rpartition(".")
            inside = leaf == "out_proj" and (
                owner in source.layers or source.known.site(owner, "out", "linear") is not None
            )
            kind, down, up = pair_tensors(tensors, "lora")
            plain = kind == "linear" and not inside and "lora_magnitude_vector" not in tensors
            _check_residual(source, layer, plain=plain)
            site = source.site(
                owner if inside else layer,
                up.shape[0],
                down.shape[1],
                kind,
                "out" if inside else WHOLE,
                kernel_entries(tensors["lora_A"]) if kind == "conv" else 1,
            )
            rank, (up, down) = _nominal_rank(source, layer, down), fitting(up, down)
            values = {"A": down, "B": up}
            if "lora_magnitude_vector" in tensors:
                values["magnitude"] = tensors["lora_magnitude_vector"].reshape(-1)
            config = (
                _config(source, owner, rank, kind, values, ATTENTION_OUTPUT)
                if inside
                else _config(source, layer, rank, kind, values)
            )
            result.add(site, config, values)
            if _is_residual(source):
                result.freeze(site.name, _constant_pair(source, site, config))
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return DoRA: a joint pair and the norms of all rows, per layer."""
        groups: dict[str, list[Entry]] = {}
        for entry in parts.entries:
            groups.setdefault(entry.site.module, []).append(entry)
        layers, ranks, alphas = {}, {}, {}
        for name, entries in groups.items():
            joint = _joint_dora(parts, name, entries)
            if joint is None:
                return None
            down, up, magnitude, scale = joint
            if entries[0].site.kind == "conv":
                magnitude = magnitude[None, :, None, None]
            layers[name] = lora_tensors(parts, entries[0], "lora", down, up)
            layers[name]["lora_magnitude_vector"] = magnitude
            ranks[name], alphas[name] = down.shape[0], scale * down.shape[0]
        return Written(lora_config(ranks, alphas) | {"use_dora": True}, layers)


def _joint_dora(
    parts: AdapterParts, layer: str, entries: list[Entry]
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return A, B, norms and scale of a layer, or None where PEFT has no DoRA for it.

    Rows are scaled one by one, so rows outside all slices keep the norm of the base weight.
    """
    sites, deltas = [entry.site for entry in entries], [entry.delta for entry in entries]
    if any(e.strength != 1.0 or e.padding is not None or e.site.groups != 1 for e in entries):
        return None
    if sites[0].key == WHOLE:
        (delta,) = deltas
        assert isinstance(delta, DoRA)
        up, down = delta.inner_pair()
        return down, up, delta.magnitude, delta.scale
    weight = parts.known.tensor(f"{layer}.weight")
    rows = [site.rows for site in sites]
    taken = [row for start, stop in filter(None, rows) for row in range(start, stop)]
    if weight is None or None in rows or len(set(taken)) != len(taken):
        return None
    up, down = stacked(parts, layer, [_factors(entry) for entry in entries])
    norms = weight.flatten(1).to(up.dtype).norm(dim=1)
    for delta, (start, stop) in zip(deltas, filter(None, rows), strict=True):
        assert isinstance(delta, DoRA)
        norms[start:stop] = delta.magnitude.detach()
    return down, up, norms, 1.0


def _factors(entry: Entry) -> Pair:
    """Return the factor pair of DoRA, without its norms."""
    delta = entry.delta
    assert isinstance(delta, DoRA)
    up, down = delta.inner_pair()
    return Pair(entry.site, up.detach(), down.detach(), delta.scale, 0.0, 0.0)


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
    constant = {"offset": values["A"].shape[0]} if _is_residual(source) else {}
    return build_config(
        "dora" if "magnitude" in values else "lora",
        {
            **constant,
            "rank": fitted,
            # The scale stays that of the nominal rank where a layer is too small for it.
            "alpha": times * float(alpha) * ((fitted / rank) ** (0.5 if rooted else 1.0)),
            "scaling": "rslora" if rooted else "standard",
            "dropout": 0.0 if kind == "embedding" else float(source.option("lora_dropout", 0.0)),
        },
    )


def _is_residual(source: Source) -> bool:
    return source.option("init_lora_weights") in _RESIDUAL_INITS


def _constant_pair(source: Source, site: Site, config: AdapterConfig) -> dict[str, Tensor]:
    """Return the pair that PEFT computes from the weight and takes off it."""
    weight = source.known.weight(site)
    if weight is None:
        raise AdapterFileError(
            f"the initial pair of {site.name} depends on the base weights: load the adapter into "
            "its model, or give the base model (--base FILE.safetensors)"
        )
    start = build_initialiser(source.option("init_lora_weights")).start(
        Given(
            site=site,
            form=config.form,
            weight=weight.detach().to("cpu", torch.float64),
            rank=config.offset,  # type: ignore[attr-defined]
            scale=config.scale,  # type: ignore[attr-defined]
            generator=torch.Generator(),
        )
    )
    assert start.up is not None
    assert start.down is not None
    return {"A0": start.down, "B0": start.up}


def _nominal_rank(source: Source, layer: str, down: Tensor) -> int:
    """Return the rank that the scale goes by: a decomposition has no more than the layer's."""
    if not _is_residual(source):
        return down.shape[0]
    return int(by_pattern(source.option("rank_pattern"), layer, source.config["r"]))


def _check_residual(source: Source, layer: str, *, plain: bool) -> None:
    """Refuse PiSSA and OLoRA on what is not plain LoRA of a Linear layer."""
    if _is_residual(source) and not plain:
        raise AdapterFileError(
            f"init_lora_weights={source.config['init_lora_weights']!r} is supported for LoRA on "
            f"Linear layers, which {layer} in this file is not"
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
