r"""LoRA-Squeeze: train at a high rank, then compress (Vulić et al. 2026, arXiv 2602.10993).

The product B A of every site is replaced by its best approximation of a smaller rank, computed from
the factors alone (`visionlora.ranks.factors`). Ranks are the same everywhere (`rank`), or as large
as a share of each site's squared singular values demands (`energy`), or they share one `budget`:
the largest singular values of all sites, scale included, are kept. A site that is left with rank 0
is taken out of the adapter; one that trains more than the pair keeps rank 1.

`keep="scaling"`: the factor s in front of B A stays and alpha follows the rank.
`keep="alpha"`: alpha stays, and the singular values are multiplied by s_old / s_new.

Post-Squeeze is `squeeze` after training. Cont-Squeeze is to train 5 to 10 % longer after it, with
the old optimiser handed to `squeeze` or a new one. In-Squeeze is the method `squeeze-lora`.

Methods with a trained pair (LoRA, DoRA, ...) keep their kind and whatever else they train; error
and energy are then those of the pair. Others with a factor form become plain LoRA, exactly.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.build import refuse_merged
from visionlora.config import AdapterConfig, LowRankConfig
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.hosts import Host, find_adapter, release
from visionlora.methods.base import Delta
from visionlora.ranks.allocation import Request, SqueezeReport, report
from visionlora.ranks.factors import Triples
from visionlora.ranks.optimizer import add, drop, group_of, replace
from visionlora.record import adapter_names, hosts_of
from visionlora.registry import build_config, get_method
from visionlora.sites import Site

Keep = Literal["scaling", "alpha"]


@dataclass(frozen=True)
class _Placed:
    """One site with its pair, and the change as seen by energy and budget."""

    path: str
    key: str
    site: Site
    delta: Delta
    carries: bool
    """The Delta can be built again with another rank; otherwise it becomes plain LoRA."""
    up: Tensor
    down: Tensor

    @property
    def size(self) -> float:
        """Factor between singular values of the pair and those of the change."""
        columns = self.delta.fold if self.carries else 1
        return abs(self.delta.scale) * columns**0.5

    @property
    def removable(self) -> bool:
        """Whether rank 0 means no change."""
        return not self.carries or len(list(self.delta.parameters())) == 2


def squeeze(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    name: str | None = None,
    keep: Keep = "scaling",
    optimizer: torch.optim.Optimizer | None = None,
) -> SqueezeReport:
    """Compress an adapter of a model in place; give one of `rank`, `energy` and `budget`.

    Args:
        model: a model with the adapter, unmerged.
        rank: rank of every site; a site whose rank is smaller keeps it.
        energy: share of the squared singular values that every site keeps, in (0, 1].
        budget: sum of the ranks of all sites.
        name: which adapter; may be omitted if there is one.
        keep: what stays as it was, the scaling factor or alpha.
        optimizer: an optimiser over the old tensors; it gets the new ones in their place, without
            their moments.

    Returns:
        Ranks and errors per site.

    Raises:
        ConfigError: not exactly one of the three, or a value out of range.
        AdapterStateError: no such adapter, it is merged, or its method has no factor form.
    """
    request = Request(rank, energy, budget)
    if keep not in get_args(Keep):
        raise ConfigError(f"squeeze: keep must be one of {get_args(Keep)}, got {keep!r}")
    refuse_merged(model, "squeeze")
    name = _choose(model, name)
    placed = [
        _place(path, key, host.state.sites[name][key], delta)
        for path, host in hosts_of(model).items()
        if name in host.adapters
        for key, delta in deltas_of(host, name).items()
    ]
    if optimizer is not None:
        _check_held(optimizer, placed)
    spectra = [request.spectrum(item.site.name, item.up, item.down, item.size) for item in placed]
    ranks = [
        found if item.removable else max(found, 1)
        for item, found in zip(placed, request.ranks(spectra), strict=True)
    ]
    if not any(ranks):
        raise ConfigError(f"squeeze: the change of adapter {name!r} is zero at every site")
    renewed = [
        _rebuilt(item, found.triples, wanted, keep) if wanted else None
        for item, found, wanted in zip(placed, spectra, ranks, strict=True)
    ]
    for item, delta in zip(placed, renewed, strict=True):
        _install(model, name, item, delta)
    _drop_shared(model, name, placed)
    if optimizer is not None:
        _hand_over(optimizer, placed, renewed)
    return report(spectra, ranks)


def resized(config: LowRankConfig, rank: int, keep: Keep) -> LowRankConfig:
    """Return the configuration of another rank, with the same scaling factor or the same alpha."""
    if keep == "alpha":
        alpha = config.rank if config.alpha is None else config.alpha
        return dataclasses.replace(config, rank=rank, alpha=float(alpha))
    same = dataclasses.replace(config, rank=rank)
    if same.scale == config.scale:
        return same
    size = rank if config.scaling == "standard" else rank**0.5
    return dataclasses.replace(config, rank=rank, alpha=config.scale * size)


def as_lora(config: AdapterConfig, rank: int, scale: float) -> LowRankConfig:
    """Return the configuration of a plain LoRA of rank `rank` and scaling factor `scale`."""
    options: dict[str, Any] = {"rank": rank, "alpha": scale * rank, "seed": config.seed}
    options["dropout"] = getattr(config, "dropout", 0.0)
    made = build_config("lora", options)
    assert isinstance(made, LowRankConfig)
    return made


def build_like(old: Delta, config: AdapterConfig, site: Site) -> Delta:
    """Return an uninitialised Delta on the device, in the type and in the mode of another."""
    made = get_method(config.method).delta(config, site, None)
    return made.to(next(old.parameters())).train(old.training)


def _choose(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is None and len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    return names[0] if name is None else find_adapter(names, name)


def deltas_of(host: Host, name: str) -> dict[str, Delta]:
    """Return the Deltas of one adapter of a layer by site key."""
    return dict(host.adapters[name].items())  # type: ignore[operator]


def _place(path: str, key: str, site: Site, delta: Delta) -> _Placed:
    if _carries(delta, site):
        up, down = delta.get_parameter("B"), delta.get_parameter("A")
        return _Placed(path, key, site, delta, True, up.detach(), down.detach())
    pair = settled_factors(delta)
    if pair is None:
        raise AdapterStateError(
            f"squeeze: {delta.config.method} at {site.name or 'the layer'} has no factor form"
        )
    return _Placed(path, key, site, delta, False, pair[0], pair[1].repeat(1, delta.fold))


@torch.no_grad()
def settled_factors(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return the factors as in evaluation, without noise."""
    training = delta.training
    try:
        return delta.eval().factors() if delta.mergeable else None
    finally:
        delta.train(training)


def _carries(delta: Delta, site: Site) -> bool:
    """Tell whether the method is a trained pair A, B that can be built again with another rank."""
    own = dict(delta.named_parameters())
    config = delta.config
    if not isinstance(config, LowRankConfig) or delta.shared or not {"A", "B"} <= own.keys():
        return False
    pair = settled_factors(delta)
    if pair is not None and not (pair[0] is own["B"] and pair[1] is own["A"]):
        return False
    try:
        twin = build_like(delta, dataclasses.replace(config, rank=1), site)
    except ConfigError:
        return False
    expected = {key: tuple(item.shape) for key, item in own.items()}
    expected["A"], expected["B"] = (1, *expected["A"][1:]), (*expected["B"][:-1], 1)
    return expected == {key: tuple(item.shape) for key, item in twin.named_parameters()}


@torch.no_grad()
def _rebuilt(item: _Placed, parts: Triples, rank: int, keep: Keep) -> Delta:
    """Return the Delta of the new rank, with everything but the pair as it was."""
    old = item.delta
    if item.carries:
        assert isinstance(old.config, LowRankConfig)
        config = resized(old.config, rank, keep)
    else:
        config = resized(as_lora(old.config, item.up.shape[1], old.scale), rank, keep)
    made = build_like(old, config, item.site)
    up, down = parts.pair(rank, old.scale / made.scale)
    if item.carries:
        tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        for key, value in [*old.named_parameters(), *old.named_buffers()]:
            if key not in ("A", "B"):
                tensors[key].copy_(value)
        for key, parameter in made.named_parameters():
            parameter.requires_grad_(old.get_parameter(key).requires_grad)
    made.get_parameter("B").copy_(up)
    made.get_parameter("A").copy_(down)
    return made


def _install(model: nn.Module, name: str, item: _Placed, delta: Delta | None) -> None:
    """Put a Delta in the place of the old one, or take the site out of the adapter."""
    host = model.get_submodule(item.path)
    assert isinstance(host, Host)
    group, state = host.adapters[name], host.state
    assert isinstance(group, nn.ModuleDict)
    if delta is not None:
        group[item.key] = delta
        host.refresh()
        return
    del group[item.key], state.sites[name][item.key]
    if not len(group):
        del host.adapters[name], state.sites[name], state.strengths[name]
        state.active = tuple(other for other in state.active if other != name)
    if len(host.adapters):
        host.refresh()
    else:
        release(host)


def _hand_over(
    optimizer: torch.optim.Optimizer, placed: list[_Placed], renewed: list[Delta | None]
) -> None:
    """Put the new parameters into the groups of the old ones."""
    for item, delta in zip(placed, renewed, strict=True):
        old = [parameter for parameter in item.delta.parameters() if parameter.requires_grad]
        if delta is not None and item.carries:
            for name, parameter in delta.named_parameters():
                carry = None if name in ("A", "B") else _unchanged
                if parameter.requires_grad:
                    replace(optimizer, item.delta.get_parameter(name), parameter, carry)
        else:
            if delta is not None:
                add(optimizer, delta.parameters(), like=old[0])
            drop(optimizer, old)
    drop(optimizer, _shared_parameters(placed))


def _shared_parameters(placed: list[_Placed]) -> list[nn.Parameter]:
    return [parameter for part in placed[0].delta.shared for parameter in part.parameters()]


def _unchanged(value: Tensor) -> Tensor:
    return value


def _check_held(optimizer: torch.optim.Optimizer, placed: list[_Placed]) -> None:
    """Refuse an optimiser that lacks a parameter, before anything is changed."""
    for item in placed:
        for parameter in item.delta.parameters():
            if parameter.requires_grad:
                group_of(optimizer, parameter)


def _drop_shared(model: nn.Module, name: str, placed: list[_Placed]) -> None:
    """Remove the model-level state that plain LoRA has no use for."""
    if any(item.delta.shared for item in placed):
        states: nn.ModuleDict = getattr(model, record.SHARED)
        del states[name]
        if not len(states):
            delattr(model, record.SHARED)
