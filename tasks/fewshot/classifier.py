"""CLIP as a classifier over a fixed list of class prompts: `logits = 100 cos(image, text)`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.fewshot import towers
from tasks.fewshot.images import Transform
from tasks.fewshot.text import text_features, text_tower
from tasks.fewshot.vision_only import VisionModel, keep_statistics
from visionlora.errors import ConfigError
from visionlora.targets import WEIGHTS

LOGIT_SCALE = 100.0
"""Fixed, as in CLIP-LoRA: the learnt scale of the backbone stays out of the adaptation."""

Encoder = Literal["vision", "text", "both"]


class Classifier(nn.Module):
    """Scores images against class prompts; what a frozen tower yields is computed only once."""

    tokens: Tensor
    mean: Tensor
    std: Tensor
    fixed_text: Tensor | None

    def __init__(
        self,
        clip: nn.Module,
        tokens: Tensor,
        transform: Transform,
        encoder: Encoder,
        text_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.encoder = encoder
        self.text_chunk = text_chunk
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("mean", _channels(transform.mean), persistent=False)
        self.register_buffer("std", _channels(transform.std), persistent=False)
        self.register_buffer("fixed_text", None, persistent=False)

    def train(self, mode: bool = True) -> "Classifier":
        """Switch dropout and the like; batch norms keep their statistics: a few shots are none."""
        super().train(mode)
        keep_statistics(self)
        return self

    @torch.no_grad()
    def cache_text(self) -> None:
        """Compute the text features once; right while the text tower is frozen."""
        self.fixed_text = text_features(self.clip, self.tokens, self.text_chunk)

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit features of `uint8 [B, 3, H, W]` pictures."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return F.normalize(self.clip.encode_image(pixels), dim=-1)

    def class_features(self) -> Tensor:
        """Return unit features of the class prompts, cached or computed."""
        if self.fixed_text is not None:
            return self.fixed_text
        return text_features(self.clip, self.tokens, self.text_chunk)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, classes]` of pictures, or of image features `[B, dim]`."""
        features = images if images.ndim == 2 else self.image_features(images)
        return self.compare(features, self.class_features())

    def compare(self, features: Tensor, classes: Tensor) -> Tensor:
        """Return logits of image features against what `class_features` returned."""
        return LOGIT_SCALE * features @ classes.t()


def adapter_targets(
    clip: nn.Module,
    encoder: Encoder,
    params: Sequence[str],
    kinds: frozenset[str] = WEIGHTS,
) -> tuple[list[str], list[str]]:
    """Return the target and exclude patterns of a CLIP model, or of a vision model without text.

    A method that serves norms only gets all norms of the towers, whatever `params` says of weights.

    Raises:
        ConfigError: `params` is empty or unknown, or a tower has no layer for it.
    """
    params = towers.checked(params)
    vision = "trunk." if isinstance(clip, VisionModel) else "visual."
    if kinds == {"norm"}:
        return [f"{vision}*" if encoder == "vision" else "*"], (
            [f"{vision}*"] if encoder == "text" else []
        )
    patterns: list[str] = []
    if encoder in ("vision", "both"):
        patterns += _vision_targets(clip, params)
    if encoder in ("text", "both"):
        tower, prefix = text_tower(clip), "text." if hasattr(clip, "text") else ""
        if not towers.has_resblocks(tower):
            raise ConfigError("this text tower is not open_clip's; use --encoder vision")
        patterns += towers.resblock_targets(tower, prefix, params)
    return patterns, [f"{vision}*"] if encoder == "text" else []


def default_params(clip: nn.Module, encoder: Encoder) -> list[str]:
    """Return what `--params` is unless the user says: q k v, and conv where there is none."""
    if encoder == "text" or towers.has_resblocks(vision_tower(clip)[0]):
        return list(towers.QKV)
    have = towers.available(vision_tower(clip)[0])
    return list(towers.QKV) if "q" in have else ["conv"]


def vision_tower(clip: Any) -> tuple[nn.Module, str]:
    """Return the module with the layers of the vision tower, and the prefix of their names."""
    if isinstance(clip, VisionModel):
        return clip.trunk, "trunk."
    trunk = getattr(clip.visual, "trunk", None)
    return (clip.visual, "visual.") if trunk is None else (trunk, "visual.trunk.")


def _vision_targets(clip: nn.Module, params: Sequence[str]) -> list[str]:
    tower, prefix = vision_tower(clip)
    if towers.has_resblocks(tower):
        return towers.resblock_targets(tower, prefix, params)
    else_use = "" if isinstance(clip, VisionModel) else "; or use --encoder text"
    return towers.timm_targets(tower, prefix, params, else_use)


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)
