"""LoRA layers for people who build their models themselves.

    layer = LoRALinear(256, 512, rank=8)              # a new layer
    layer = LoRALinear.from_linear(linear, rank=8)    # around a given one, sharing its weight

Each is the plain layer with one LoRA adapter named `default` and frozen weights. A model built of
them trains, saves, loads, merges and ejects like one that went through `inject`; call
`freeze_base(model, train=("head",))` to freeze what is not an adapter.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from visionlora.build import check_dropout
from visionlora.errors import ConfigError, TargetError
from visionlora.hosts import (
    AttentionHost,
    ConvHost,
    EmbeddingHost,
    Host,
    LinearHost,
    describe,
    prepare,
)
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.hosts.choose import choose_host
from visionlora.hosts.shortcuts import close_shortcut
from visionlora.methods.lora import LoRA, LoRAConfig
from visionlora.registry import build_config
from visionlora.sites import named_generator

__all__ = ["LoRAConv2d", "LoRAEmbedding", "LoRALinear", "LoRAMultiheadAttention"]

Built = TypeVar("Built", bound=nn.Module)


def _add_lora(layer: Any, keys: Sequence[str], seed: int | None, options: dict[str, Any]) -> None:
    """Freeze a fresh host and give it a LoRA adapter on the named sites."""
    # Like the weights of any new layer, the factors follow torch.manual_seed unless a seed is
    # given.
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    if "init" in options:  # a state dict that is loaded later would bring another weight
        raise ConfigError(
            f"{type(layer).__name__} draws its factors as LoRA does: for another start call "
            f"initialise(model, {options['init']!r}) on the finished model"
        )
    config = cast(LoRAConfig, build_config("lora", {"seed": seed, **options}))
    prepare(layer, "auto")
    deltas = {}
    for key in keys:
        site = describe("", layer, key)
        config.check_site(site)
        check_dropout(config, site, "auto")
        weight = stored(layer, parameter_name(layer, key)).detach()
        delta = LoRA(config, site).to(
            torch.float64 if weight.dtype == torch.float64 else torch.float32
        )
        delta.reset_parameters(view_of(weight, site), named_generator(config.seed, key))
        deltas[key] = (site, delta.to(weight.device))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.add("default", deltas)
    close_shortcut(layer)  # whatever model the layer is put into


def _adopt(
    cls: type[Built],
    layer: nn.Module,
    plain: type[nn.Module],
    keys: Sequence[str],
    seed: int | None,
    options: dict[str, Any],
) -> Built:
    """Return a `cls` that shares every tensor and attribute of a plain layer."""
    if isinstance(layer, Host) or not isinstance(layer, plain):
        raise TargetError(
            f"{cls.__name__} is built from a plain {plain.__name__}, got a {type(layer).__name__}"
        )
    if choose_host(layer, "", layer, "factored")[0] not in cls.__mro__:
        raise TargetError(f"{cls.__name__} cannot be built from a {type(layer).__name__}")
    adopted = cls.__new__(cls)
    adopted.__dict__.update(layer.__dict__)
    # Own registries, so that neither adapters nor hooks appear in the layer that was given.
    for registry, value in layer.__dict__.items():
        if isinstance(value, dict):
            adopted.__dict__[registry] = value.copy()
    _add_lora(adopted, keys, seed, options)
    return adopted


class LoRALinear(LinearHost, nn.Linear):
    """A Linear with LoRA: `y = W x + b + s B A x`; see `visionlora.methods.lora`."""

    plain_class: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        seed: int | None = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        """Take the arguments of `nn.Linear`, then the options of `LoRAConfig`."""
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        _add_lora(self, ("weight",), seed, {"rank": rank, **options})

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int = 8, *, seed: int | None = None, **options: Any
    ) -> "LoRALinear":
        """Return a LoRA layer that shares the weight and bias of `linear`."""
        return _adopt(cls, linear, nn.Linear, ("weight",), seed, {"rank": rank, **options})


class LoRAConv2d(ConvHost, nn.Conv2d):
    """A Conv2d with LoRA on its reshaped kernel; any stride, dilation, padding and grouping."""

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        rank: int = 8,
        alpha: float | None = None,
        scaling: str = "standard",
        dropout: float = 0.0,
        seed: int | None = None,
        **layer_options: Any,
    ) -> None:
        """Take the arguments of `nn.Conv2d`, and the options of `LoRAConfig` by keyword."""
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, *args, **layer_options)
        options = {
            "rank": rank,
            "alpha": alpha,
            "scaling": scaling,
            "dropout": dropout,
        }
        _add_lora(self, ("weight",), seed, options)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, rank: int = 8, *, seed: int | None = None, **options: Any
    ) -> "LoRAConv2d":
        """Return a LoRA layer that shares the kernel and bias of `conv`."""
        return _adopt(cls, conv, nn.Conv2d, ("weight",), seed, {"rank": rank, **options})


class LoRAEmbedding(EmbeddingHost, nn.Embedding):
    """An Embedding with LoRA on its transposed table."""

    plain_class: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        scaling: str = "standard",
        seed: int | None = None,
        **layer_options: Any,
    ) -> None:
        """Take the arguments of `nn.Embedding`, and the options of `LoRAConfig` by keyword."""
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, **layer_options)
        _add_lora(
            self,
            ("weight",),
            seed,
            {"rank": rank, "alpha": alpha, "scaling": scaling},
        )

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, rank: int = 8, *, seed: int | None = None, **options: Any
    ) -> "LoRAEmbedding":
        """Return a LoRA layer that shares the table of `embedding`."""
        return _adopt(cls, embedding, nn.Embedding, ("weight",), seed, {"rank": rank, **options})


class LoRAMultiheadAttention(AttentionHost, nn.MultiheadAttention):
    """A MultiheadAttention with separate LoRA on the chosen projections."""

    plain_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *args: Any,
        rank: int = 8,
        projections: Sequence[str] = ("q", "v"),
        alpha: float | None = None,
        scaling: str = "standard",
        lora_dropout: float = 0.0,
        seed: int | None = None,
        **layer_options: Any,
    ) -> None:
        """Take the arguments of `nn.MultiheadAttention`, and LoRA's by keyword.

        `lora_dropout` is the adapter's, because `dropout` is that of the attention weights.
        """
        nn.MultiheadAttention.__init__(self, embed_dim, num_heads, *args, **layer_options)
        options = {
            "rank": rank,
            "alpha": alpha,
            "scaling": scaling,
            "dropout": lora_dropout,
        }
        _add_lora(self, _check_projections(projections), seed, options)

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        rank: int = 8,
        *,
        projections: Sequence[str] = ("q", "v"),
        seed: int | None = None,
        **options: Any,
    ) -> "LoRAMultiheadAttention":
        """Return a LoRA layer that shares all weights of `attention`."""
        keys = _check_projections(projections)
        return _adopt(cls, attention, nn.MultiheadAttention, keys, seed, {"rank": rank, **options})


def _check_projections(projections: Sequence[str]) -> Sequence[str]:
    from visionlora.targets import ATTENTION_SLICES

    projections = (projections,) if projections == "out" else projections  # not its letters
    wrong = [item for item in projections if item not in ATTENTION_SLICES]
    if wrong or not projections:
        raise TargetError(
            f"projections must be some of {', '.join(ATTENTION_SLICES)}, got {list(projections)}"
        )
    return projections
