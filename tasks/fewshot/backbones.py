"""Backbones by name: open_clip's models with weights by tag or file, the embedded tiny one, timm's.

`ViT-B/16`, `ViT-B/32`, `ViT-L/14` mean what they mean in the literature: OpenAI's weights, which
need the quick-GELU configuration. Any other name is open_clip's own and needs `--pretrained`;
`timm:NAME` is a vision model without text (`tasks/fewshot/vision_only.py`).
"""

import logging
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.fewshot.images import Transform
from tasks.fewshot.vision_only import PREFIX, VisionModel, load_vision
from tasks.fewshot.weights import require_weights, tagged_weights
from visionlora.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Alias:
    """A name from the literature: open_clip's name, OpenAI's weights on the hub and as a file."""

    name: str
    hub: str
    file: str


ALIASES = {
    "ViT-B/16": Alias("ViT-B-16", "timm/vit_base_patch16_clip_224.openai/", "ViT-B-16.pt"),
    "ViT-B/32": Alias("ViT-B-32", "timm/vit_base_patch32_clip_224.openai/", "ViT-B-32.pt"),
    "ViT-L/14": Alias("ViT-L-14", "timm/vit_large_patch14_clip_224.openai/", "ViT-L-14.pt"),
    "ViT-L/14@336px": Alias(
        "ViT-L-14-336", "timm/vit_large_patch14_clip_336.openai/", "ViT-L-14-336px.pt"
    ),
}
OPENAI = "openai"
TINY = "tiny"
RANDOM_SEED = 0


@dataclass(frozen=True)
class Backbone:
    """A frozen CLIP model with its tokenizer and image transform.

    A vision model without text takes the place of `clip`; its tokenizer refuses.
    """

    name: str
    pretrained: str
    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    transform: Transform
    random_weights: bool = False

    @property
    def has_text(self) -> bool:
        """Whether classes can be given by their names alone."""
        return not isinstance(self.clip, VisionModel)


def load_backbone(
    name: str, pretrained: str | None = None, image_size: int | None = None
) -> Backbone:
    """Return the model called `name` in evaluation mode, on the CPU, in fp32.

    Args:
        name: `tiny`, an alias such as `ViT-B/16`, a name that open_clip lists, or `timm:NAME`.
        pretrained: A tag of open_clip or timm, a weights file, or `none` for random weights.
        image_size: Side of the input of a timm model; default that of its weights.

    Raises:
        ConfigError: unknown name or tag, weights that are neither here nor reachable, or
            weights whose activation function is not the model's.
    """
    if name == TINY:
        return _tiny(pretrained)
    if name.startswith(PREFIX):
        found = load_vision(name, pretrained, image_size)
        return Backbone(
            name, found.pretrained, found.model, _no_text, found.transform, found.random_weights
        )
    if name in ALIASES and pretrained in (None, OPENAI):
        # Before open_clip is imported, which takes seconds: missing weights are soon said.
        require_weights(name, OPENAI, ALIASES[name].hub, ALIASES[name].file)
    open_clip = _open_clip()
    known = [*ALIASES, *open_clip.list_models()]
    if name not in known:
        raise ConfigError(
            f"unknown backbone {name!r}{nearest(name, [TINY, *known])}; "
            f"{TINY}, {', '.join(ALIASES)}, a name of open_clip.list_models(), or {PREFIX}NAME"
        )
    if pretrained is None:
        if name not in ALIASES:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise ConfigError(
                f"backbone {name} needs --pretrained TAG, FILE or none; "
                f"tags: {', '.join(tags) or 'none known'}"
            )
        pretrained = OPENAI
    config_name, checkpoint, preprocess = _resolve(open_clip, name, pretrained)
    tokenizer = _tokenizer(open_clip, config_name)
    with _quiet_root_logger(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        clip = open_clip.create_model(config_name, load_weights=False, pretrained_text=False)
    if checkpoint is not None:
        _load_weights(clip, checkpoint, config_name)
    clip.eval().requires_grad_(False)
    transform = _transform(open_clip, clip, preprocess)
    return Backbone(
        name,
        pretrained,
        clip,
        tokenizer,
        transform,
        random_weights=checkpoint is None,
    )


def _tiny(pretrained: str | None) -> Backbone:
    from tasks.fewshot.tiny import load_tiny_clip

    if pretrained is not None:
        raise ConfigError(
            f"the tiny backbone carries its own weights; leave out --pretrained {pretrained}"
        )
    clip, tokenizer = load_tiny_clip()
    clip.eval().requires_grad_(False)
    half = (0.5, 0.5, 0.5)
    return Backbone(TINY, "embedded", clip, tokenizer, Transform(16, half, half, oversample=2))


def _tokenizer(open_clip: Any, name: str) -> Callable[[list[str]], Tensor]:
    try:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
    except Exception as error:  # SigLIP's and Hugging Face's are downloaded
        raise ConfigError(
            f"no tokeniser for {name}: it is not in the cache, and the download failed "
            f"({_short(error)}); run once with network"
        ) from error
    return tokenizer


def _no_text(prompts: list[str]) -> Tensor:
    raise ConfigError("a timm backbone has no text tower; class names mean nothing to it")


def _resolve(open_clip: Any, name: str, pretrained: str) -> tuple[str, Path | None, dict[str, Any]]:
    """Return the configuration's name, the weights file (None: random) and the preprocessing."""
    plain = ALIASES[name].name if name in ALIASES else name
    quick = f"{plain}-quickgelu"
    has_quick = name in ALIASES and quick in open_clip.list_models()
    if pretrained == "none":
        return quick if has_quick else plain, None, {}
    tag = open_clip.get_pretrained_cfg(plain, pretrained)
    if tag:
        wants_quick = bool(tag.get("quick_gelu", False))
        if has_quick:
            plain = quick if wants_quick else plain
        elif wants_quick != _is_quick(open_clip, plain):
            other = quick if wants_quick else plain.removesuffix("-quickgelu")
            raise ConfigError(
                f"the weights {pretrained!r} want {'quick-' if wants_quick else 'plain '}GELU "
                f"and {plain} has the other kind; use --backbone {other}"
            )
        return plain, tagged_weights(plain, pretrained, tag), tag
    file = Path(pretrained).expanduser()
    if not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(plain)
        raise ConfigError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {plain}"
            f"{nearest(pretrained, tags)}; tags: {', '.join(tags)}"
        )
    plain = quick if has_quick else plain
    if _is_torchscript(file) and not _is_quick(open_clip, plain):
        raise ConfigError(
            f"{file} is an OpenAI archive, trained with quick-GELU, and {plain} is the other kind; "
            f"use --backbone {quick if quick in open_clip.list_models() else 'ViT-B/16'}"
        )
    return plain, file, {}


def _is_quick(open_clip: Any, name: str) -> bool:
    return bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))


def _load_weights(clip: nn.Module, file: Path, name: str) -> None:
    """Load open_clip, OpenAI or third-party weights; all keys must fit."""
    from open_clip.factory import load_checkpoint

    try:
        if _is_torchscript(file):
            state = torch.jit.load(str(file), map_location="cpu").state_dict()
            for key in ("input_resolution", "context_length", "vocab_size"):
                state.pop(key, None)
            clip.load_state_dict({key: value.float() for key, value in state.items()})
        else:
            load_checkpoint(clip, str(file), strict=True, weights_only=True)
    except Exception as error:  # readers of four formats, each with its own exceptions
        raise DataError(f"{file} does not hold weights of {name}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or repr(error), 160)


def _is_torchscript(file: Path) -> bool:
    """Tell whether `file` is a TorchScript archive, as OpenAI published its models."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def _transform(open_clip: Any, clip: Any, preprocess: dict[str, Any]) -> Transform:
    size = clip.visual.image_size
    defaults = open_clip.transform.PreprocessCfg()
    return Transform(
        size=int(size[0] if isinstance(size, tuple | list) else size),
        mean=tuple(preprocess.get("mean", defaults.mean)),
        std=tuple(preprocess.get("std", defaults.std)),
        squash=preprocess.get("resize_mode", "shortest") == "squash",
    )


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "this backbone needs open_clip: pip install 'visionlora[fewshot]'"
        ) from error
    return open_clip


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip's warnings about random weights, which we load ourselves, off the screen."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
