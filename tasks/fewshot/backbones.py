"""CLIP models by name: open_clip's, with weights by tag or file, and the embedded tiny one.

`ViT-B/16`, `ViT-B/32`, `ViT-L/14` mean what they mean in the literature: OpenAI's weights, which
need the quick-GELU configuration. Any other name is open_clip's own and needs `--pretrained`.
"""

import logging
import textwrap
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.fewshot.images import Transform
from visionlora.errors import ConfigError, DataError, nearest

ALIASES = {
    "ViT-B/16": "ViT-B-16",
    "ViT-B/32": "ViT-B-32",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
TINY = "tiny"
PROBE_SECONDS = 3.0
"""How long to wait for the weights' host before saying that there is no network."""
RANDOM_SEED = 0

WAY_OUT = (
    "pass a file (--pretrained FILE), fill the cache (run once with network), use --backbone tiny, "
    "or --pretrained none (random weights, for timing only)"
)


@dataclass(frozen=True)
class Backbone:
    """A frozen CLIP model with its tokenizer and image transform."""

    name: str
    pretrained: str
    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    transform: Transform
    random_weights: bool = False


def load_backbone(name: str, pretrained: str | None = None) -> Backbone:
    """Return the model called `name` in evaluation mode, on the CPU, in fp32.

    Args:
        name: `tiny`, an alias such as `ViT-B/16`, or a name that open_clip lists.
        pretrained: A tag of open_clip, a weights file, or `none` for random weights.

    Raises:
        ConfigError: unknown name or tag, weights that are neither here nor reachable, or
            weights whose activation function is not the model's.
    """
    if name == TINY:
        return _tiny(pretrained)
    open_clip = _open_clip()
    known = [*ALIASES, *open_clip.list_models()]
    if name not in known:
        raise ConfigError(
            f"unknown backbone {name!r}{nearest(name, [TINY, *known])}; "
            f"{TINY}, {', '.join(ALIASES)} or a name of open_clip.list_models()"
        )
    if pretrained is None:
        if name not in ALIASES:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise ConfigError(
                f"backbone {name} needs --pretrained TAG, FILE or none; "
                f"tags: {', '.join(tags) or 'none known'}"
            )
        pretrained = "openai"
    config_name, checkpoint, preprocess = _resolve(open_clip, name, pretrained)
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
        open_clip.get_tokenizer(config_name),
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


def _resolve(open_clip: Any, name: str, pretrained: str) -> tuple[str, Path | None, dict[str, Any]]:
    """Return the configuration's name, the weights file (None: random) and the preprocessing."""
    plain = ALIASES.get(name, name)
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
        return plain, _tagged_weights(plain, pretrained, tag), tag
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


def _tagged_weights(name: str, tag_name: str, tag: dict[str, Any]) -> Path:
    """Return the cached weights of a tag, or download them; say so quickly if neither works."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    url = str(tag.get("url", ""))
    if tag.get("hf_hub"):
        repo, _, file = str(tag["hf_hub"]).rpartition("/")
        files = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        if file.endswith((".bin", ".pth")):
            files.insert(0, f"{file[:-4]}.safetensors")
        for candidate in files:
            cached = try_to_load_from_cache(repo, candidate)
            if isinstance(cached, str):
                return Path(cached)
        url = hf_hub_url(repo, files[-1])
    in_old_cache = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
    if in_old_cache.is_file():
        return in_old_cache
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(url)
    if problem:
        raise ConfigError(
            f"no weights for {name} ({tag_name}): not in the cache, and {problem}; {WAY_OUT}"
        )
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # open_clip and the hub raise whatever their transport raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"no weights for {name} ({tag_name}): the download failed ({reason}); {WAY_OUT}"
        ) from error


def _unreachable(url: str) -> str:
    """Return why `url` cannot be reached, or an empty string.

    The probe runs on its own thread because name resolution obeys no timeout.
    """
    problem = [f"{url.split('/')[2]} did not answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            opener = urllib.request.build_opener(_NoRedirect)
            opener.open(request, timeout=PROBE_SECONDS).close()
            problem[0] = ""
        except urllib.error.HTTPError as error:
            # A redirect, a missing file or a login is an answer: the download itself tells more.
            known = error.code < 400 or error.code in (401, 404)
            problem[0] = "" if known else f"{url.split('/')[2]} answers {error}"
        except OSError as error:
            problem[0] = (
                f"{url.split('/')[2]} cannot be reached ({getattr(error, 'reason', error)})"
            )

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return problem[0]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Take a redirect for an answer instead of following it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


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
        reason = textwrap.shorten(str(error) or repr(error), 160)
        raise DataError(f"{file} does not hold weights of {name}: {reason}") from error


def _is_torchscript(file: Path) -> bool:
    """Tell whether `file` is a TorchScript archive, as OpenAI published its models."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def _transform(open_clip: Any, clip: nn.Module, preprocess: dict[str, Any]) -> Transform:
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
