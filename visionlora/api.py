"""The verbs: put adapters into a model, switch them, merge them, take them out.

All verbs work in place on any `nn.Module`. Whatever can fail is checked before the model is
touched.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from torch import nn

from visionlora import record
from visionlora.build import install, prepare_adapter, refuse_merged
from visionlora.compose import parse
from visionlora.config import AdapterConfig
from visionlora.errors import AdapterStateError, ConfigError, TargetError, nearest
from visionlora.hosts import Host, Mode, describe, find_adapter, release
from visionlora.hosts.base import parameter_name, stored
from visionlora.hosts.lean import forget_origins, write_origins
from visionlora.hosts.shortcuts import reopen_shortcuts
from visionlora.init.base import Initialiser
from visionlora.init.initialise import initialise_prepared
from visionlora.init.suitable import check_form
from visionlora.lean import lean_makers
from visionlora.record import adapter_names, hosts_of
from visionlora.registry import build_initialiser, get_method, list_initialisers
from visionlora.targets import find_targets, matches_parameter

Patterns = str | Sequence[str]


def inject(
    model: nn.Module,
    method: str | AdapterConfig = "lora",
    targets: Patterns = "type:Linear",
    *,
    exclude: Patterns = (),
    name: str = "default",
    mode: Mode = "auto",
    freeze: bool = True,
    init: str | Initialiser | None = None,
    lean: bool = False,
    **options: Any,
) -> nn.Module:
    """Add an adapter to the layers that `targets` names, and freeze the rest of the model.

    Args:
        model: any module; changed in place.
        method: registered name or preset (`lora`, `block-lora`, `dora`, ...), or a configuration.
        targets: patterns of layers and slices, see `visionlora.targets`.
        exclude: patterns that are taken out again.
        name: name of the adapter; several may live on one model.
        mode: `auto` picks the cheaper exact path per layer; `factored` or `dense` force one.
        freeze: set `requires_grad` of all base parameters to False, the first time.
        init: how the factors start, from the weight alone (`pissa`, `olora`, ...); starts that
            look at data are for `initialise`.
        lean: keep no input that a LayerNorm or an activation can make again in the backward. The
            same gradients, about a third less memory of a transformer block, for one more
            elementwise operation. For factor pairs without dropout, in blocks named like timm's or
            open_clip's; see `visionlora.lean`.
        **options: fields of the method's configuration, such as `rank=8`.

    Returns:
        The same model.

    Raises:
        ConfigError: unknown method or option, a rank that a site cannot have, or a method that
            cannot be lean.
        TargetError: a pattern that matches nothing or something unsupported; nothing to be lean at.
        AdapterStateError: the name is taken, or the model is merged.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config, start = _as_config(method, init, options)
    matches = find_targets(model, targets, exclude, config.kinds)
    sites = [describe(match.name, match.module, key) for match in matches for key in match.keys]
    adapter = prepare_adapter(model, [(site, config) for site in sites], name=name, mode=mode)
    if start is not None:
        adapter = initialise_prepared(model, adapter, start)
    found = lean_makers(model, adapter) if lean else []
    install(model, adapter, freeze=freeze)
    write_origins(found)
    return model


def eject(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Remove all adapters; the model is then exactly as before `inject`.

    Class, parameters, checkpoint keys, `requires_grad` flags and buffers are restored. With
    `merge=True` the active changes stay in the weights, and buffers stay as trained.

    Raises:
        AdapterStateError: there is no adapter.
    """
    hosts = _hosts(model)
    if merge:
        _refuse_routed(hosts)
        _refuse_tied(model, hosts)
    reopen_shortcuts(model)
    forget_origins(model)
    for host in hosts.values():
        merged = host.state.originals is not None
        if merge and not merged:
            host.merge()
        if merge or merged:
            host.unmerge(restore=not merge)
        release(host)  # type: ignore[arg-type]
    if hasattr(model, record.SHARED):
        delattr(model, record.SHARED)
    record.drop_record(model, restore_buffers=not merge)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Add the active changes to the weights, so that inference costs nothing extra.

    Copies of the changed weights are kept until `unmerge`. The sum is formed in at least float32
    and rounded once; merging into half precision warns if it loses more than 5 % of the change.

    Raises:
        AdapterStateError: no adapter, already merged, or an adapted weight is shared with a layer
            that is not adapted.
    """
    hosts = _hosts(model)
    refuse_merged(model, "merge again")
    _refuse_routed(hosts)
    _refuse_tied(model, hosts)
    for host in hosts.values():
        host.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit.

    Raises:
        AdapterStateError: the model is not merged.
    """
    hosts = _hosts(model)
    if not any(host.state.originals is not None for host in hosts.values()):
        raise AdapterStateError("the model is not merged")
    for host in hosts.values():
        host.unmerge()
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merge inside a `with` block and unmerge after it, whatever happens."""
    merge(model)
    try:
        yield model
    finally:
        if any(host.state.originals is not None for host in hosts_of(model).values()):
            unmerge(model)  # not if the block has unmerged or ejected it


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model inside a `with` block: no adapter applies.

    Raises:
        AdapterStateError: the model is merged, so the base weights are not there.
    """
    hosts = _hosts(model)
    refuse_merged(model, "disable adapters")
    before = [host.state.enabled for host in hosts.values()]
    _set_enabled(hosts, [False] * len(before))
    try:
        yield model
    finally:
        _set_enabled(hosts, before)


def use(model: nn.Module, name: str | Sequence[str] | None) -> nn.Module:
    """Make one adapter active, or several (their changes add up), or none.

    Raises:
        AdapterStateError: an unknown name, or the model is merged.
    """
    hosts = _hosts(model)
    refuse_merged(model, "switch adapters")
    wanted = [] if name is None else [name] if isinstance(name, str) else list(dict.fromkeys(name))
    for item in wanted:
        find_adapter(adapter_names(model), item)
    for host in hosts.values():
        host.state.active = tuple(item for item in wanted if item in host.adapters)
        host.refresh()
    return model


def set_scale(model: nn.Module, scale: float, name: str | None = None) -> nn.Module:
    """Multiply the change of one adapter (or of all) by `scale`; 1 is as trained.

    Raises:
        AdapterStateError: an unknown name, or the model is merged.
        ConfigError: the scale is not a finite number.
    """
    hosts = _hosts(model)
    refuse_merged(model, "change the scale")
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"the scale of an adapter must be a finite number, got {scale!r}")
    names = adapter_names(model) if name is None else [find_adapter(adapter_names(model), name)]
    for host in hosts.values():
        host.state.strengths.update({item: float(scale) for item in names if item in host.adapters})
        host.refresh()
    return model


def freeze_base(model: nn.Module, train: Patterns = ()) -> nn.Module:
    """Freeze every base parameter except those that `train` names (`("head", "*.norm")`).

    A pattern is a glob matched against the dotted parameter name, its suffixes, and the names of
    the modules it belongs to. What stays trainable is saved with the adapter.

    Raises:
        TargetError: a pattern that matches no parameter.
    """
    record.start_record(model)
    patterns = [train] if isinstance(train, str) else list(train)
    base = record.base_parameters(model)
    kept: set[str] = set()
    for pattern in patterns:
        found = {name for name, _ in base if matches_parameter(name, pattern)}
        if not found:
            owners = [name.rpartition(".")[0] for name, _ in base]
            raise TargetError(
                f"train pattern {pattern!r} matches no parameter{nearest(pattern, owners)}"
            )
        kept |= found
    for name, parameter in base:
        parameter.requires_grad_(name in kept)
    return model


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what an optimiser should get: active adapters, and base parameters left trainable."""
    owners = record.adapter_parameter_owners(model)
    active = {name for host in hosts_of(model).values() for name in host.state.active}
    for name, parameter in model.named_parameters():
        owner = owners.get(id(parameter))
        if parameter.requires_grad and (owner is None or owner in active):
            yield name, parameter


def _as_config(
    method: str | AdapterConfig, init: str | Initialiser | None, options: dict[str, Any]
) -> tuple[AdapterConfig, Initialiser | None]:
    """Return the configuration, and the initialiser if there is one."""
    if not isinstance(method, str):
        if not isinstance(method, AdapterConfig):
            raise ConfigError(f"method must be a name or a configuration, got {method!r}")
        if options:
            raise ConfigError(
                f"options {sorted(options)} must be fields of the configuration that was given"
            )
        return method, None if init is None else build_initialiser(init)
    recipe = parse(method)
    if recipe.dynamics:
        names = ", ".join(item.name for item in recipe.dynamics)
        raise ConfigError(
            f"{method}: {names} is a training dynamics, not part of the model: inject "
            f"{recipe.method!r} and pass parse({method!r}).build_dynamics(model, optimizer, steps) "
            "to fit or to a Stepper"
        )
    if isinstance(init, str) and is_own_start(init, get_method(recipe.method).config):
        return recipe.config(**options, init=init), None
    if init is not None and recipe.init is not None:
        raise ConfigError(f"{method} brings its own start: leave out init={init!r}")
    start = recipe.init if init is None else build_initialiser(init)
    config = recipe.config(**options)
    if start is not None:
        check_form(start, config)
    return config, start


def is_own_start(init: str, config: type[AdapterConfig]) -> bool:
    """Whether `init` is for the method's own option of that name, be it to refuse the value."""
    own = get_args(get_type_hints(config).get("init"))
    kind = list_initialisers().get(init)
    return init in own or (bool(own) and (kind is None or config.form not in kind.forms))


def _hosts(model: nn.Module) -> dict[str, Host]:
    hosts = hosts_of(model)
    if not hosts:
        raise AdapterStateError(
            f"this {type(model).__name__} has no adapter; call inject or load first"
        )
    return hosts


def _refuse_routed(hosts: dict[str, Host]) -> None:
    """Refuse to merge a change that depends on the input."""
    for path, host in hosts.items():
        for slot in host.all_slots():
            if not slot.delta.mergeable:
                raise AdapterStateError(
                    f"{slot.delta.config.method} at {path or 'the layer'} routes by input, so it "
                    "cannot be merged; freeze_routing makes plain LoRA of it"
                )


def _refuse_tied(model: nn.Module, hosts: dict[str, Host]) -> None:
    """Refuse to merge into a weight that another module uses as well."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # each module once, under however many names
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    for path, host in hosts.items():
        for slot in host.all_slots():
            weight = stored(host, parameter_name(host, slot.key))
            names = owners.get(id(weight), [])
            if len(names) > 1:
                raise AdapterStateError(
                    f"the weight of {path} is shared ({', '.join(names)}): merging would change "
                    f"the others"
                )


def _set_enabled(hosts: dict[str, Host], values: list[bool]) -> None:
    for host, value in zip(hosts.values(), values, strict=True):
        if isinstance(host, Host):  # not if it was ejected meanwhile
            host.state.enabled = value
            host.refresh()
