"""What a published checkpoint is, read off the names and shapes of its tensors."""

import re
from collections.abc import Mapping

from torch import Tensor

from tasks.restoration.networks.catalogue import Spec


def guess(tensors: Mapping[str, Tensor]) -> Spec | None:
    """Return the network that a state dict is of, None if it is neither NAFNet nor Restormer."""
    if "intro.weight" in tensors and any(name.startswith("middle_blks.") for name in tensors):
        return Spec(
            "nafnet",
            {
                "width": tensors["intro.weight"].shape[0],
                "encoders": _stages(tensors, "encoders"),
                "middle": _count(tensors, r"middle_blks\.(\d+)\."),
                "decoders": _stages(tensors, "decoders"),
            },
        )
    if "patch_embed.proj.weight" in tensors and "latent.0.attn.temperature" in tensors:
        levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
        return Spec(
            "restormer",
            {
                "width": tensors["patch_embed.proj.weight"].shape[0],
                "blocks": [_count(tensors, rf"{level}\.(\d+)\.") for level in levels],
                "refinement": _count(tensors, r"refinement\.(\d+)\."),
                "heads": [len(tensors[f"{level}.0.attn.temperature"]) for level in levels],
                "bias_free": "latent.0.norm1.body.bias" not in tensors,
            },
        )
    return None


def _stages(tensors: Mapping[str, Tensor], name: str) -> list[int]:
    return [
        _count(tensors, rf"{name}\.{stage}\.(\d+)\.")
        for stage in range(_count(tensors, rf"{name}\.(\d+)\."))
    ]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)
