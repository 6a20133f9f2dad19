"""What is measured: the model, the floor, full fine-tuning, and each method in both libraries."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import timm
from torch import nn

import visionlora as vl
from benchmarks.peers import PEERS
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError, nearest
from visionlora.hosts import describe
from visionlora.registry import build_config

CLASSES = 100
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TARGETS = [f"blocks.*.{layer}" for layer in LAYERS]
# What a method is used with, where that is not the common rank: a random basis has few trained
# scalars per rank, so it is used with many; a bank of vectors has many; LoLDU keeps all pivots.
USUAL_RANK: dict[str, int | None] = {
    "adalora": 12,
    "block-lora": 8,
    "loldu": None,
    "miss": 64,
    "rand-lora": 32,
    "tiny-lora": 2,
    "uni-lora": 4,
    "vb-lora": 4,
    "vera": 256,
}
DEFAULT_RANK = 8


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    library: str
    method: str
    rank: int | None
    model: nn.Module


def build_base(name: str, depth: int) -> nn.Module:
    """Return a timm vision transformer of `depth` blocks with random weights."""
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, depth=depth, num_classes=CLASSES)
        model.get_parameter("cls_token")
        for layer in LAYERS:
            model.get_submodule(f"blocks.0.{layer}")
    except (AttributeError, TypeError):
        raise ConfigError(
            f"{name} is not a plain vision transformer with a class token and blocks of "
            f"{', '.join(LAYERS)}; use one such as vit_base_patch16_224"
        ) from None
    return model.requires_grad_(False)


def floor(base: nn.Module) -> Contestant:
    """Everything frozen, but the gradient has to reach the input of the first block."""
    model = copy.deepcopy(base)
    model.get_parameter("cls_token").requires_grad_(True)
    return Contestant("torch", "floor", None, model)


def full_finetuning(base: nn.Module) -> Contestant:
    """Every weight trained."""
    return Contestant("torch", "full", None, copy.deepcopy(base).requires_grad_(True))


def method_config(method: str, rank: int | None) -> AdapterConfig:
    """Return our configuration: defaults, no dropout, and the rank asked for or usual."""
    return build_config(method, usual_options(method, rank))


def usual_options(method: str, rank: int | None) -> dict[str, Any]:
    """Return the options that all methods are measured with, as far as a method has them."""
    fields = {field.name for field in dataclasses.fields(vl.get_method(method).config)}
    options: dict[str, Any] = {}
    if "rank" in fields:
        options["rank"] = rank or USUAL_RANK.get(method, DEFAULT_RANK)
    if "dropout" in fields:
        options["dropout"] = 0.0
    return options


def check_sites(base: nn.Module, config: AdapterConfig) -> None:
    """Raise `ConfigError` if a layer cannot have this configuration."""
    for layer in LAYERS:
        name = f"blocks.0.{layer}"
        config.check_site(describe(name, base.get_submodule(name), "weight"))


def adapted(base: nn.Module, method: str, rank: int | None) -> Iterator[Contestant]:
    """Yield PEFT's model, where PEFT has the method, and ours, with the same settings."""
    config = method_config(method, rank)
    used = getattr(config, "rank", None)
    if config.method in PEERS:
        settings = PEERS[config.method](config)
        settings.target_modules = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
        model = peft.get_peft_model(copy.deepcopy(base), settings)
        yield Contestant("peft", method, used, model)
    model = copy.deepcopy(base)
    vl.inject(model, config, targets=TARGETS)
    yield Contestant("visionlora", method, used, model)
