"""PEFT's OFT and BOFT.

| PEFT | here |
|---|---|
| OFT `oft_R`, `oft_embedding_R`: blocks x b (b - 1) / 2 | `Q`, with the other sign for the series |
| BOFT `boft_R`: m x blocks x b x b, `boft_s` | upper triangle of `(R - R^T) / 2`, and `s` |

On a convolution PEFT's OFT is read as it merges, not as its unmerged forward computes. BOFT with
more than one rotation is written as plain LoRA: PEFT reads it only with a compiled extension.
"""

from collections.abc import Mapping as Table
from typing import Any, ClassVar

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts
from visionlora.io.peft.mapping import (
    Mapping,
    Source,
    Translation,
    Written,
    register,
    whole_layers,
)
from visionlora.methods.boft import BOFT
from visionlora.methods.oft import OFT
from visionlora.methods.parts.rotations import entries, skew
from visionlora.registry import build_config
from visionlora.sites import Kind

_TERMS = 5


@register
class OFTMapping(Mapping):
    """OFT."""

    kind = "OFT"
    methods = ("oft",)
    marks = ("oft_R", "oft_embedding_R")
    neutral: ClassVar[Table[str, tuple[Any, ...]]] = {"coft": ()}

    def read(self, source: Source) -> Translation:
        """Return OFT on the layers that have tensors; their size is not among these."""
        result = Translation()
        series = bool(source.option("use_cayley_neumann", False))
        terms = source.option("num_cayley_neumann_terms", _TERMS)
        if series and terms != _TERMS:
            raise AdapterFileError(
                f"PEFT's OFT with num_cayley_neumann_terms={terms} is not supported, only {_TERMS}"
            )
        for layer, tensors in source.layers.items():
            kind: Kind = "embedding" if "oft_embedding_R" in tensors else "linear"
            values = tensors["oft_embedding_R" if kind == "embedding" else "oft_R"]
            config = build_config(
                "oft",
                {
                    "block": _block(values.shape[1]),
                    "share": bool(source.option("block_share", False)),
                    "cayley": "neumann" if series else "exact",
                },
            )
            sign = -1.0 if series else 1.0
            result.add(source.known_site(layer, kind), config, {"Q": sign * values})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the triangles."""
        deltas = [entry.delta for entry in parts.entries]
        configs = {delta.options for delta in deltas if isinstance(delta, OFT)}
        shapes = {(config.block, config.share, config.cayley) for config in configs}
        if not whole_layers(parts, "linear", "embedding") or len(shapes) != 1:
            return None
        block, share, cayley = shapes.pop()
        layers = {}
        for entry in parts.entries:
            assert isinstance(entry.delta, OFT)
            name = "oft_embedding_R" if entry.site.kind == "embedding" else "oft_R"
            sign = -1.0 if cayley == "neumann" else 1.0
            layers[entry.site.module] = {name: sign * entry.delta.Q}
        config = {
            "peft_type": "OFT",
            "r": 0,
            "oft_block_size": block,
            "block_share": share,
            "coft": False,
            "use_cayley_neumann": cayley == "neumann",
            "num_cayley_neumann_terms": _TERMS,
        }
        return Written(config, layers)


@register
class BOFTMapping(Mapping):
    """BOFT."""

    kind = "BOFT"
    methods = ("boft",)
    marks = ("boft_R", "boft_s")

    def read(self, source: Source) -> Translation:
        """Return BOFT on the layers that have tensors."""
        result = Translation()
        for layer, tensors in source.layers.items():
            rotations, scale = tensors["boft_R"], tensors["boft_s"].reshape(-1)
            depth, count, block, _ = rotations.shape
            rows, columns = torch.triu_indices(block, block, 1).unbind()
            values = (rotations - rotations.mT) / 2
            site = source.site(layer, len(scale), count * block, "linear")
            config = build_config("boft", {"block": block, "depth": depth})
            result.add(site, config, {"Q": values[..., rows, columns], "s": scale})
        return result

    def write(self, parts: AdapterParts) -> Written | None:
        """Return the skew matrices of a single rotation, and the scales."""
        deltas = [entry.delta for entry in parts.entries]
        shapes = {
            (delta.options.block, delta.options.depth)
            for delta in deltas
            if isinstance(delta, BOFT)
        }
        if not whole_layers(parts, "linear", "conv") or len(shapes) != 1:
            return None
        block, depth = shapes.pop()
        if depth != 1:
            return None
        layers: dict[str, dict[str, Tensor]] = {}
        for entry in parts.entries:
            delta = entry.delta
            assert isinstance(delta, BOFT)
            scale = delta.s[None] if entry.site.kind == "conv" else delta.s[:, None]
            layers[entry.site.module] = {"boft_R": skew(delta.Q, block), "boft_s": scale}
        config = {
            "peft_type": "BOFT",
            "boft_block_size": block,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": depth,
        }
        return Written(config, layers)


def _block(count: int) -> int:
    """Return the size of a skew matrix with `count` free entries."""
    block = int((1 + (1 + 8 * count) ** 0.5) / 2)
    if entries(block) != count:
        raise AdapterFileError(f"{count} values are no triangle of a square matrix")
    return block
