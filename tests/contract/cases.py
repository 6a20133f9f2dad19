"""What the contract runs over: every registered configuration, and every kind of weight.

Nothing here lists methods. The configurations come from the registry: each method with its
defaults, once more for every other value of its `Literal` options, and every preset. So a new
method file is covered by being registered.

The reference of a site is torch's own layer, called with `W + delta(W)` in place of its weight.
"""

import copy
import functools
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import visionlora as vl
from tests.contract.kinds import FEW, FUSED, Kind
from visionlora.config import AdapterConfig
from visionlora.hosts import Host, Mode, describe
from visionlora.hosts.base import bias_name
from visionlora.methods.base import Delta
from visionlora.methods.parts.pair import PairDelta
from visionlora.record import adapter_parameter_owners
from visionlora.registry import build_config, get_method, list_methods, list_presets
from visionlora.targets import find_targets

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
    if hasattr(config, "offset"):  # a constant pair of another rank than the trained one, and equal
        yield from (replace(config, offset=rank) for rank in (1, 2))
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
_all.update(dict.fromkeys(_small(item.name) for item in list_presets() if not item.factors))
CONFIGS = list(_all)
DEFAULTS = [_small(name) for name in list_methods()]


def is_routed(config: AdapterConfig) -> bool:
    """Whether the change depends on the input, so that no matrix defines it."""
    return not get_method(config.method).delta.mergeable


MATRICES = [config for config in CONFIGS if not is_routed(config)]
DEFAULT_MATRICES = [config for config in DEFAULTS if not is_routed(config)]


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
    """Move every trainable of the adapters away from its initial value, and constant pairs too."""
    generator = torch.Generator().manual_seed(3000 + seed)
    owners = adapter_parameter_owners(model)
    for _, parameter in vl.trainable_parameters(model):
        if id(parameter) not in owners:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.3 * noise.to(parameter.dtype))
    for delta in (item for item in model.modules() if isinstance(item, PairDelta)):
        for tensor in delta.frozen().values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(0.3 * noise.to(tensor.dtype))


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
        return FUSED[key][1]
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
