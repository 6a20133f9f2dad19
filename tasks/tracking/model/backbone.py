"""Frozen ViTs by variant, and where their weights come from.

* `hub`: timm's copy of DINOv2, from the local cache or downloaded.
* a file: DINOv2's own `dinov2_vitb14_pretrain.pth`, or timm's, safetensors or pickle; a pickle is
  read with `weights_only=True`. What a file is shows in its content, not in its name.
* `embedded`: those that come with this package, for `tiny`.
* `random`: for timing and tests; said aloud, since a tracker of random weights finds nothing.

DINOv2's names are timm's but for SwiGLU (`mlp.w12` is `mlp.fc1`, `mlp.w3` is `mlp.fc2`, the same
layout: the first half gates the second) and a `mask_token` that only its pretraining used.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.shared.weights import require_weights
from tasks.tracking.model.tensors import fill, read_tensors
from tasks.tracking.model.variants import Variant
from visionlora.errors import ConfigError

HUB = "hub"
EMBEDDED = "embedded"
RANDOM = "random"
RANDOM_SEED = 0
_DINOV2 = ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))

logger = logging.getLogger(__name__)


def load_backbone(
    variant: Variant, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the ViT of a variant in timm's form, frozen.

    Args:
        variant: which one.
        weights: `hub`, `embedded`, `random` or a file; default the first that there is.
        device: where it is built; on `meta` it has no values, whatever `weights` says.

    Raises:
        ConfigError: weights that are neither here nor reachable.
        DataError: a file of something else.
    """
    if torch.device(device).type == "meta":
        return blank(variant, device)
    if weights == RANDOM:
        logger.warning("%s: random backbone, for timing and tests only", variant.name)
        return blank(variant, device)
    usual = EMBEDDED if variant.embedded else HUB
    weights = weights or usual
    if weights == usual:
        found = _embedded() if variant.embedded else _from_hub(variant)
        return found.to(device).requires_grad_(False)
    backbone = blank(variant, "cpu")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"backbone weights {str(weights)!r} of {variant.name} are no file; give {usual}, "
            f"{RANDOM}, or a file{f' such as {variant.file}' if variant.file else ''}"
        )
    fill(backbone, from_dinov2(read_tensors(path)), f"{path} does not hold {variant.backbone}")
    return backbone.to(device)


def from_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint under timm's names; one that has them already stays as it is."""
    return {timm_name(name): value for name, value in tensors.items() if name != "mask_token"}


def timm_name(name: str) -> str:
    """Return timm's name of one of DINOv2's tensors."""
    for theirs, ours in _DINOV2:
        name = re.sub(theirs, ours, name)
    return name


def blank(variant: Variant, device: str | torch.device) -> nn.Module:
    """Return a frozen backbone with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(RANDOM_SEED)
        backbone = _create(variant)
    return backbone.requires_grad_(False)


def _create(variant: Variant, **options: Any) -> nn.Module:
    import timm  # takes a second

    if variant.embedded:
        from tasks.shared.tiny_vit.model import TinyViT

        return TinyViT()
    # timm's own positions, drop-path and size checks are not used: LoRAT has its own.
    backbone: nn.Module = timm.create_model(
        variant.backbone, num_classes=0, dynamic_img_size=True, **options
    )
    return backbone


def _embedded() -> nn.Module:
    from tasks.shared.tiny_vit import tiny_vit

    return tiny_vit()


def _from_hub(variant: Variant) -> nn.Module:
    hub = f"timm/{variant.backbone}/model.safetensors"
    way_out = f"give the file {variant.file} of DINOv2, or {RANDOM} (for timing only)"
    require_weights(variant.name, variant.backbone, hub, way_out=way_out)
    try:
        return _create(variant, pretrained=True)
    except Exception as error:  # the hub raises whatever its transport raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"no weights for {variant.name} ({variant.backbone}): the download failed ({reason}); "
            f"{way_out}"
        ) from error
