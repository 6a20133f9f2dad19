"""What the contract runs over: every registered configuration, and every kind of weight.

Nothing here lists methods. The configurations come from the registry: each method with its
defaults, once more for every other value of its `Literal` options, and every preset. So a new
method file is covered by being registered.

The reference of a site is torch's own layer, called with `W + delta(W)` in place of its weight.
"""

import copy
import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import visionlora as vl
from visionlora.config import AdapterConfig
from visionlora.hosts import Host, Mode, describe
from visionlora.hosts.base import bias_name
from visionlora.methods.base import Delta
from visionlora.record import adapter_parameter_owners
from visionlora.registry import build_config, get_method, list_methods, list_presets
from visionlora.targets import find_targets

WIDTH = 12
# Options that make a method small enough for these sites, by name.
SMALL = {
    "rank": 2,
    "alpha": 3.0,
    "dropout": 0.0,
    "length": 16,
    "coefficients": 5,
    "bank": 6,
    "block": 2,
    "experts": 3,
    "atoms": 4,
    "width": 8,
    "depth": 1,
}


# -- configurations


@functools.cache
def _small(name: str) -> AdapterConfig:
    """Return a method or preset at a rank that the small sites have, without dropout."""
    config = build_config(name)
    names = {field.name for field in fields(config)}
    return replace(config, **{key: value for key, value in SMALL.items() if key in names})


def _alternatives(config: AdapterConfig) -> Iterator[AdapterConfig]:
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            for value in typing.get_args(hints[field.name]):
                yield replace(config, **{field.name: value})


@functools.cache
def _label(config: AdapterConfig) -> str:
    default = _small(config.method)
    changed = [
        str(getattr(config, field.name))
        for field in fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    ]
    return "-".join([config.method, *changed])


_all: dict[AdapterConfig, None] = {}
for _name in list_methods():
    _all[_small(_name)] = None
    _all.update(dict.fromkeys(_alternatives(_small(_name))))
_all.update(dict.fromkeys(_small(preset.name) for preset in list_presets()))
CONFIGS = list(_all)
DEFAULTS = [_small(name) for name in list_methods()]


def is_routed(config: AdapterConfig) -> bool:
    """Whether the change depends on the input, so that no matrix defines it."""
    return not get_method(config.method).delta.mergeable


MATRICES = [config for config in CONFIGS if not is_routed(config)]
DEFAULT_MATRICES = [config for config in DEFAULTS if not is_routed(config)]


# -- sites


class Net(nn.Module):
    """One adapted layer, called as a model would call it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the layer's output tensor."""
        return self.call(self.layer, *inputs)


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _self_attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def _cross_attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return layer(query, key, value, need_weights=True)[0]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of weight: the layer, how it is called, and which rows each site has."""

    name: str
    layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    views: dict[str, tuple[str, slice]]
    """`{site key: (parameter, rows)}`."""
    target: str = "layer"
    call: Callable[..., Tensor] = _plain
    indices: bool = False
    norm: bool = False

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
        """Return a fresh base model; the same seed gives the same weights."""
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(1000 + seed)
        model = Net(self.layer(), self.call).to(dtype)
        torch.default_generator.set_state(state)
        return model

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(2000 + seed)
        if self.indices:
            return (torch.randint(0, 20, self.shapes[0], generator=generator),)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in self.shapes
        )


_ALL = {"weight": ("weight", slice(None))}
_E = 8
_FUSED = {
    "q": ("in_proj_weight", slice(0, _E)),
    "k": ("in_proj_weight", slice(_E, 2 * _E)),
    "v": ("in_proj_weight", slice(2 * _E, 3 * _E)),
    "out": ("out_proj.weight", slice(None)),
}
_SEPARATE = {
    "q": ("q_proj_weight", slice(None)),
    "k": ("k_proj_weight", slice(None)),
    "v": ("v_proj_weight", slice(None)),
    "out": ("out_proj.weight", slice(None)),
}


def _conv(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **options)


def _mha(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.MultiheadAttention(_E, 2, **options)
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:  # zero at first, which would hide a bias that is applied wrongly
                nn.init.normal_(bias)
        return layer

    return build


def _lively(norm: nn.Module) -> nn.Module:
    """Give a norm weights and biases that are not ones and zeros."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


KINDS = [
    Kind("linear-square", lambda: nn.Linear(WIDTH, WIDTH), ((2, 5, WIDTH),), _ALL),
    Kind("linear-tall", lambda: nn.Linear(6, 20), ((7, 6),), _ALL),
    Kind("linear-wide", lambda: nn.Linear(20, 6, bias=False), ((3, 2, 2, 20),), _ALL),
    Kind("linear-vector", lambda: nn.Linear(6, 8), ((6,),), _ALL),
    Kind("linear-many-tokens", lambda: nn.Linear(6, 6), ((64, 6),), _ALL),
    Kind(
        "qkv-slices",
        lambda: nn.Linear(WIDTH, 3 * WIDTH),
        ((2, 5, WIDTH),),
        {"q": ("weight", slice(0, WIDTH)), "v": ("weight", slice(2 * WIDTH, 3 * WIDTH))},
        target="layer[q,v]",
    ),
    Kind(
        "row-range",
        lambda: nn.Linear(WIDTH, 2 * WIDTH),
        ((4, WIDTH),),
        {"rows_0_10": ("weight", slice(0, 10))},
        target="layer[0:10]",
    ),
    Kind("conv-1x1", _conv(4, 6, 1), ((2, 4, 5, 5),), _ALL),
    Kind("conv-strided", _conv(4, 6, 3, stride=2, dilation=2, padding=1), ((2, 4, 9, 8),), _ALL),
    Kind("conv-groups", _conv(4, 6, 3, groups=2, padding=1), ((2, 4, 5, 5),), _ALL),
    Kind("conv-depthwise", _conv(4, 4, 3, groups=4, padding="same"), ((2, 4, 6, 6),), _ALL),
    Kind(
        "conv-multiplier",
        _conv(4, 8, (2, 3), groups=4, bias=False, stride=(1, 2)),
        ((2, 4, 6, 6),),
        _ALL,
    ),
    Kind(
        "conv-circular",
        _conv(2, 4, 3, padding=(1, 2), padding_mode="circular"),
        ((2, 2, 6, 6),),
        _ALL,
    ),
    Kind("conv-single-image", _conv(2, 4, 3), ((2, 6, 6),), _ALL),
    Kind(
        "conv-rows",
        _conv(2, 8, 3),
        ((2, 2, 6, 6),),
        {"rows_2_6": ("weight", slice(2, 6))},
        target="layer[2:6]",
    ),
    Kind("mha-self", _mha(batch_first=True), ((2, 5, _E),), _FUSED, call=_self_attention),
    Kind(
        "mha-sequence-first",
        _mha(bias=False),
        ((5, 2, _E),),
        {key: _FUSED[key] for key in ("q", "v")},
        target="layer[q,v]",
        call=_self_attention,
    ),
    Kind(
        "mha-cross",
        _mha(batch_first=True),
        ((2, 5, _E), (2, 3, _E), (2, 3, _E)),
        _FUSED,
        call=_cross_attention,
    ),
    Kind(
        "mha-widths",
        _mha(kdim=6, vdim=10),
        ((5, 2, _E), (3, 2, 6), (3, 2, 10)),
        _SEPARATE,
        call=_cross_attention,
    ),
    Kind("mha-unbatched", _mha(), ((5, _E),), _FUSED, call=_self_attention),
    Kind(
        "embedding",
        lambda: nn.Embedding(20, 8, padding_idx=3),
        ((4, 7),),
        _ALL,
        indices=True,
    ),
    Kind("layer-norm", lambda: _lively(nn.LayerNorm(6)), ((2, 5, 6),), _ALL, norm=True),
    Kind("group-norm", lambda: _lively(nn.GroupNorm(2, 4)), ((2, 4, 3, 3),), _ALL, norm=True),
]
FEW = [
    kind
    for kind in KINDS
    if kind.name
    in ("linear-wide", "qkv-slices", "conv-strided", "mha-self", "embedding", "layer-norm")
]


@functools.cache
def refused(config: AdapterConfig, kind: Kind) -> bool:
    """Whether the configuration itself declares that it cannot serve the kind."""
    model = kind.model()
    try:
        matches = find_targets(model, kind.target, (), config.kinds)
        sites = [describe(match.name, match.module, key) for match in matches for key in match.keys]
        for site in sites:
            config.check_kind(site)
            config.check_site(site)
        config.check_plan(sites)
    except (vl.errors.ConfigError, vl.errors.TargetError):
        return True
    return False


def modes(config: AdapterConfig, kind: Kind) -> list[Mode]:
    """Return the modes that a method and a layer have."""
    if kind.norm:
        return ["auto", "dense"]
    return ["auto", "factored"] if is_routed(config) else ["auto", "factored", "dense"]


def pairs(configs: list[AdapterConfig], kinds: list[Kind], *, served: bool = True) -> Any:
    """Parametrise `config, kind` over what is served (or refused).

    Other values of an option run on a few kinds, because a layer does not know options.
    """
    found = [
        pytest.param(config, kind, id=f"{_label(config)}:{kind.name}")
        for config in configs
        for kind in kinds
        if (config in DEFAULTS or kind in FEW or not served) and refused(config, kind) is not served
    ]
    return pytest.mark.parametrize(("config", "kind"), found)


# -- helpers


def inject(model: nn.Module, config: AdapterConfig, kind: Kind, **options: Any) -> nn.Module:
    """Adapt the kind's sites; noise that a method draws while training is left out."""
    return without_noise(vl.inject(model, config, kind.target, **options))


def without_noise(model: nn.Module) -> nn.Module:
    """Put the methods that draw noise while training into evaluation, and nothing else."""
    for module in model.modules():
        if isinstance(module, Delta) and module.stochastic:
            module.eval()
    return model


def adapted(config: AdapterConfig, kind: Kind, *, seed: int = 0, **options: Any) -> nn.Module:
    """Return a fresh model whose adapter has random trainables."""
    model = inject(kind.model(), config, kind, **options)
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Move every trainable of the adapters away from its initial value."""
    generator = torch.Generator().manual_seed(3000 + seed)
    owners = adapter_parameter_owners(model)
    for _, parameter in vl.trainable_parameters(model):
        if id(parameter) not in owners:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.3 * noise.to(parameter.dtype))


def host_of(model: nn.Module) -> Host:
    """Return the one adapted layer."""
    (host,) = (module for module in model.modules() if isinstance(module, Host))
    return host


def deltas_of(model: nn.Module, name: str = "default") -> dict[str, Delta]:
    """Return `{site key: Delta}` of an adapter."""
    return dict(host_of(model).adapters[name].items())


def changed_weights(
    model: nn.Module,
    kind: Kind,
    base: nn.Module,
    strengths: dict[str, float] | None = None,
    *,
    detach: bool = True,
) -> dict[str, Tensor]:
    """Return `{parameter name: W + sum of delta(W)}`, differentiable in all trainables.

    It is differentiable in the weights of the base as well if they are not detached.
    """
    weights = {
        name: parameter.detach() if detach else parameter
        for name, parameter in base.layer.named_parameters()
    }
    result = dict(weights)
    for adapter, strength in (strengths or {"default": 1.0}).items():
        for key, delta in deltas_of(model, adapter).items():
            parameter, rows = kind.views[key]
            frozen = weights[parameter]
            whole = torch.zeros_like(frozen)
            if kind.indices:
                change = delta.delta(frozen.t()).t()
                keep = torch.ones(len(frozen), 1, dtype=frozen.dtype)
                keep[base.layer.padding_idx] = 0
                part = change * keep
            else:
                own = frozen[rows]
                part = delta.delta(own.reshape(len(own), -1)).reshape(own.shape)
            index = torch.arange(len(frozen))[rows]
            result[parameter] = result[parameter] + strength * whole.index_add(0, index, part)
            shift = delta.bias_change()
            if shift is not None:
                bias = bias_name(base.layer, key)
                index = torch.arange(len(result[bias]))[_rows_of_bias(base.layer, key, rows)]
                none = torch.zeros_like(result[bias])
                result[bias] = result[bias] + strength * none.index_add(0, index, shift)
    return result


def _rows_of_bias(layer: nn.Module, key: str, rows: slice) -> slice:
    """Return the entries of the bias that belong to a site."""
    if isinstance(layer, nn.MultiheadAttention) and key in ("q", "k", "v"):
        return _FUSED[key][1]
    return rows


def definition(
    model: nn.Module,
    kind: Kind,
    inputs: tuple[Tensor, ...],
    strengths: dict[str, float] | None = None,
) -> Tensor:
    """Return the output of torch's own layer with `W + delta(W)` as its weight."""
    base = kind.model()
    weights = changed_weights(model, kind, base, strengths)
    return functional_call(base, {f"layer.{key}": item for key, item in weights.items()}, inputs)


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return gradients of a fixed random projection of the output; zeros where there is no path."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), tensors, allow_unused=True)
    return [
        torch.zeros_like(item) if gradient is None else gradient
        for item, gradient in zip(tensors, found, strict=True)
    ]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that `eject` and a refused verb must leave as it was."""
    return {
        "tensors": {key: item.clone() for key, item in model.state_dict().items()},
        "identities": {name: id(item) for name, item in model.named_parameters()},
        "flags": {name: item.requires_grad for name, item in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: len(m._forward_pre_hooks) for name, m in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare with a snapshot, bit for bit."""
    after = snapshot(model)
    assert list(after["tensors"]) == list(before["tensors"])
    for key, item in before["tensors"].items():
        assert torch.equal(after["tensors"][key], item), key
    for part in ("identities", "flags", "classes", "attributes", "hooks", "modes"):
        assert after[part] == before[part], part


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy."""
    return copy.deepcopy(model)
