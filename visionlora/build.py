"""Building an adapter and making it part of a model.

The two steps are apart so that whatever can be refused is refused before the model is touched:
`prepare_adapter` checks and builds, `install` cannot fail. `inject` and `load` go through both.
"""

import re
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import nn

from visionlora import record
from visionlora.config import AdapterConfig
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.hosts import Host, Mode, attach, choose_host
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.hosts.shortcuts import close_shortcuts
from visionlora.methods.base import Delta, Shared
from visionlora.record import adapter_names, hosts_of
from visionlora.registry import get_method
from visionlora.sites import Site, named_generator


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter that is built and checked, but not yet part of a model."""

    name: str
    deltas: dict[str, dict[str, tuple[Site, Delta]]]
    """`{module: {key: (site, delta)}}`."""
    hosts: dict[str, tuple[type[Host], Mode] | None]
    """Host class and mode of each layer; None where the layer is a host already."""
    shared: Shared | None


def prepare_adapter(
    model: nn.Module,
    plan: list[tuple[Site, AdapterConfig]],
    *,
    name: str = "default",
    mode: Mode = "auto",
) -> PreparedAdapter:
    """Build an adapter for an explicit list of sites without touching the model (see `inject`)."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
        raise ConfigError(f"adapter name {name!r} must consist of letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"adapter name {name!r} is taken by torch; choose another")
    if name in adapter_names(model):
        raise AdapterStateError(
            f"the model already has an adapter named {name!r}; eject it or choose another name"
        )
    refuse_merged(model, "inject")
    if not all(host.state.enabled for host in hosts_of(model).values()):
        raise AdapterStateError("adapters are disabled: leave the `with disabled` block first")
    modules = {site.module: model.get_submodule(site.module) for site, _ in plan}
    hosts = {
        path: None if isinstance(module, Host) else choose_host(model, path, module, mode)
        for path, module in modules.items()
    }
    for path, module in modules.items():
        if isinstance(module, Host) and mode not in ("auto", module.state.mode):
            raise AdapterStateError(
                f"{path} is adapted already, in mode {module.state.mode!r}; it cannot be {mode!r} "
                "too"
            )
    for site, config in plan:
        config.check_kind(site)
        config.check_site(site)
        chosen = hosts[site.module]
        used = chosen[1] if chosen else _host(modules[site.module]).state.mode
        check_dropout(config, site, used)
        _check_routed(config, site, used)
    for config in dict.fromkeys(config for _, config in plan):
        config.check_plan([site for site, other in plan if other == config])
    shared = build_shared(modules[plan[0][0].module], plan) if plan else None
    deltas: dict[str, dict[str, tuple[Site, Delta]]] = {}
    for site, config in plan:
        delta = build_delta(modules[site.module], site, config, shared)
        deltas.setdefault(site.module, {})[site.key] = (site, delta)
    return PreparedAdapter(name, deltas, hosts, shared)


def install(model: nn.Module, adapter: PreparedAdapter, *, freeze: bool = True) -> nn.Module:
    """Make a prepared adapter part of the model; nothing in here can be refused."""
    first = record.record_of(model) is None
    record.start_record(model)
    for path, group in adapter.deltas.items():
        module, chosen = model.get_submodule(path), adapter.hosts[path]
        host = attach(module, *chosen) if chosen else _host(module)
        host.add(adapter.name, group)
    close_shortcuts(model)
    if adapter.shared is not None:
        if not hasattr(model, record.SHARED):
            model.add_module(record.SHARED, record.SharedStates())
        cast(nn.ModuleDict, getattr(model, record.SHARED))[adapter.name] = adapter.shared
    if freeze and first:
        for _, parameter in record.base_parameters(model):
            parameter.requires_grad_(False)
    return model


def refuse_merged(model: nn.Module, what: str) -> None:
    """Raise `AdapterStateError` while the weights hold the changes."""
    if any(host.state.originals is not None for host in hosts_of(model).values()):
        raise AdapterStateError(f"the model is merged: unmerge before you {what}")


def build_shared(module: nn.Module, plan: list[tuple[Site, AdapterConfig]]) -> Shared | None:
    """Build the model-level state, if the method has one.

    Args:
        module: the layer of the first site, whose device and type it gets.
        plan: all sites with their configurations.
    """
    configs = [
        config
        for config in dict.fromkeys(config for _, config in plan)
        if get_method(config.method).shared is not None
    ]
    if len(configs) > 1:
        raise ConfigError("an adapter with shared tensors has one configuration, not several")
    for config in configs:
        kind = cast(type[Shared], get_method(config.method).shared)
        shared = kind(config, [site for site, other in plan if other == config])
        weight = stored(module, parameter_name(module, plan[0][0].key))
        return shared.to(weight.device, _adapter_dtype(weight))
    return None


def build_delta(
    module: nn.Module, site: Site, config: AdapterConfig, shared: Shared | None
) -> Delta:
    """Build one Delta with its initial values, on the device of its weight."""
    weight = stored(module, parameter_name(module, site.key)).detach()
    delta = get_method(config.method).delta(config, site, shared).to(_adapter_dtype(weight))
    delta.reset_parameters(view_of(weight, site), named_generator(config.seed, site.name))
    return delta.to(weight.device)


def _adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """Adapters are float32 beside half-precision weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_dropout(config: AdapterConfig, site: Site, mode: Mode) -> None:
    """Refuse input dropout where it could not act."""
    if not getattr(config, "dropout", 0.0):
        return
    if mode == "dense":
        why = "whose weight is read directly (dense mode)"
    elif site.kind == "embedding":
        why = "whose input are indices"
    else:
        return
    raise ConfigError(
        f"{config.method}: dropout cannot act on {site.module or 'the layer'}, {why}; "
        "set dropout=0 or exclude it"
    )


def _check_routed(config: AdapterConfig, site: Site, mode: Mode) -> None:
    """Refuse a change that depends on the input where the layer's weight is read as a matrix."""
    if mode == "dense" and not get_method(config.method).delta.mergeable:
        raise ConfigError(
            f"{config.method} routes by input, so it cannot act on {site.module or 'the layer'}, "
            "whose weight is read directly (dense mode); exclude it"
        )


def _host(module: nn.Module) -> Host:
    assert isinstance(module, Host)
    return module
