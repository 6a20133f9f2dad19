"""CLIP as a classifier over a fixed list of class prompts: `logits = 100 cos(image, text)`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.fewshot.images import Transform
from tasks.fewshot.text import text_features, text_tower
from visionlora.errors import ConfigError
from visionlora.targets import WEIGHTS

LOGIT_SCALE = 100.0
"""Fixed, as in CLIP-LoRA: the learnt scale of the backbone stays out of the adaptation."""

Encoder = Literal["vision", "text", "both"]

VIT_SLICES = ("q", "k", "v", "out")
"""What `--params` can name inside an attention, besides `mlp`."""


class Classifier(nn.Module):
    """Scores images against class prompts; what a frozen tower yields is computed only once."""

    tokens: Tensor
    mean: Tensor
    std: Tensor
    fixed_text: Tensor | None

    def __init__(
        self, clip: nn.Module, tokens: Tensor, transform: Transform, encoder: Encoder
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.encoder = encoder
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("mean", _channels(transform.mean), persistent=False)
        self.register_buffer("std", _channels(transform.std), persistent=False)
        self.register_buffer("fixed_text", None, persistent=False)

    @torch.no_grad()
    def cache_text(self) -> None:
        """Compute the text features once; right while the text tower is frozen."""
        self.fixed_text = text_features(self.clip, self.tokens)

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit features of `uint8 [B, 3, H, W]` pictures."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return F.normalize(self.clip.encode_image(pixels), dim=-1)

    def class_features(self) -> Tensor:
        """Return unit features of the class prompts, cached or computed."""
        if self.fixed_text is not None:
            return self.fixed_text
        return text_features(self.clip, self.tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, classes]` of pictures, or of image features `[B, dim]`."""
        features = images if images.ndim == 2 else self.image_features(images)
        return LOGIT_SCALE * features @ self.class_features().t()


def adapter_targets(
    clip: nn.Module,
    encoder: Encoder,
    params: Sequence[str],
    kinds: frozenset[str] = WEIGHTS,
) -> tuple[list[str], list[str]]:
    """Return the target and exclude patterns of an open_clip model.

    A method that serves norms only gets all norms of the towers, whatever `params` says of weights.

    Raises:
        ConfigError: `params` is empty or unknown, or a tower is no open_clip or timm ViT.
    """
    params = ["out" if name == "o" else name for name in params]
    if unknown := [name for name in params if name not in (*VIT_SLICES, "mlp")]:
        raise ConfigError(f"unknown --params {unknown[0]!r}; any of q k v out mlp")
    if not params:
        raise ConfigError("--params needs at least one of q k v out mlp")
    if kinds == {"norm"}:
        return ["visual.*" if encoder == "vision" else "*"], (
            ["visual.*"] if encoder == "text" else []
        )
    patterns: list[str] = []
    if encoder in ("vision", "both"):
        patterns += _vision_patterns(clip, params)
    if encoder in ("text", "both"):
        if not hasattr(getattr(text_tower(clip), "transformer", None), "resblocks"):
            raise ConfigError("this text tower is not open_clip's; use --encoder vision")
        prefix = "text.transformer" if hasattr(clip, "text") else "transformer"
        patterns += _resblocks(prefix, params)
    return patterns, ["visual.*"] if encoder == "text" else []


def _vision_patterns(clip: nn.Module, params: Sequence[str]) -> list[str]:
    visual = clip.visual
    if hasattr(getattr(visual, "transformer", None), "resblocks"):
        return _resblocks("visual.transformer", params)
    trunk = getattr(visual, "trunk", None)
    if trunk is None or not hasattr(getattr(trunk, "blocks", [None])[0], "attn"):
        raise ConfigError("this vision tower is no ViT; use --encoder text")
    attention = [name for name in params if name in ("q", "k", "v")]
    patterns = [f"visual.trunk.blocks.*.attn.qkv[{','.join(attention)}]"] if attention else []
    patterns += ["visual.trunk.blocks.*.attn.proj"] if "out" in params else []
    mlp = ["visual.trunk.blocks.*.mlp.fc1", "visual.trunk.blocks.*.mlp.fc2"]
    return patterns + (mlp if "mlp" in params else [])


def _resblocks(prefix: str, params: Sequence[str]) -> list[str]:
    slices = [name for name in VIT_SLICES if name in params]
    patterns = [f"{prefix}.resblocks.*.attn[{','.join(slices)}]"] if slices else []
    if "mlp" in params:
        patterns += [f"{prefix}.resblocks.*.mlp.c_fc", f"{prefix}.resblocks.*.mlp.c_proj"]
    return patterns


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)
