"""Making a base network trainable in the way that a method says.

    change    adapters on the weights of conv and linear layers; of whole weights, a difference
    extras    vectors of the network, trained in place: biases, norms, beta and gamma, temperature

Both are one adapter file of the core: it holds the change of every layer, and the vectors as they
are. Training a difference from zero without decay is training the weight itself. Training from
scratch begins at the difference between fresh weights and the base, so that its result is an
adapter of the same base as the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import visionlora as vl
from tasks.restoration.networks.files import Base
from tasks.restoration.training.methods import BIAS, COLORA, DECODER, LORA, SCRATCH, WHOLE
from visionlora import record
from visionlora.compose import parse
from visionlora.errors import ConfigError
from visionlora.hosts import describe
from visionlora.hosts.base import view_of
from visionlora.ranks.assigned import inject_ranks
from visionlora.ranks.contribution import (
    Allocation,
    LayerSize,
    allocate,
    layer_sizes,
    uniform,
)
from visionlora.ranks.structure import places_of
from visionlora.targets import LAYERS, find_targets

DECODING = ("up", "decoder", "reduce_chan", "refinement", "ending", "output")
"""How the parts of NAFNet and Restormer begin that lie behind the middle."""
CONVS_AND_LINEARS = frozenset({"conv", "linear"})


@dataclass(frozen=True)
class Tuned:
    """What became trainable."""

    ranks: Mapping[str, int]
    """By layer, where layers have ranks."""
    dense: frozenset[str]
    """Layers whose weight is trained as a whole."""
    extras: tuple[str, ...]
    """Parameters that are trained in place."""
    trainable: int
    parameters: int

    @property
    def percent(self) -> float:
        """Share of the parameters of the network."""
        return 100 * self.trainable / self.parameters


def tune(
    base: Base,
    method: str,
    options: Mapping[str, Any],
    *,
    scores: Mapping[str, float] | None = None,
    budget: float = 0.07,
    gamma: float = 0.5,
    beta: float = 0.01,
    least: int = 1,
    extras: bool = True,
    seed: int = 0,
) -> Tuned:
    """Freeze a base network but for what a method trains.

    Args:
        base: the network, changed in place.
        method: see `methods.py`.
        options: of the method.
        scores: contributions of the layers, for colora.
        budget: share of the parameters that colora and lora may train, extras included.
        gamma: see `visionlora.ranks.contribution`.
        beta: see there.
        least: see there.
        extras: whether vectors are trained too.
        seed: of initial values.

    Raises:
        ConfigError: the method cannot serve this network or budget.
    """
    model = base.model
    total = sum(p.numel() for p in model.parameters())
    vectors = vectors_of(model)
    options = {"seed": seed, **options}
    ranks: Mapping[str, int] = {}
    dense: frozenset[str] = frozenset()
    if method in (COLORA, LORA):
        given = options.pop("rank", None)
        sizes = layer_sizes(model, weight_patterns(model))
        if given is not None:
            found = _of_rank(sizes, given)
        else:
            room = int(budget * total) - (_count(model, vectors) if extras else 0)
            found = _within(sizes, room, total, scores, gamma=gamma, beta=beta, least=least)
        ranks, dense = found.ranks, found.dense
        # Through the changed weight: thin maps of full size cost more than a sum of weights.
        inject_ranks(model, ranks, mode="auto" if options.get("dropout") else "dense", **options)
    elif method in WHOLE:
        dense = _whole(model, method)
        vl.inject(model, "full", sorted(dense))
        vectors = [
            name
            for name, _ in record.base_parameters(model)
            if name.removesuffix(".weight") not in dense
            and (method != DECODER or name.startswith(DECODING))
        ]
    else:
        ranks = _registered(model, "bitfit" if method == BIAS else method, options)
    chosen = tuple(_uncovered(model, vectors)) if extras or method in (*WHOLE, BIAS) else ()
    for name, parameter in record.base_parameters(model):
        parameter.requires_grad_(name in chosen)
    if method == SCRATCH:
        _start_afresh(base, seed)
    trainable = sum(p.numel() for _, p in vl.trainable_parameters(model))
    return Tuned(ranks, dense, chosen, trainable, total)


def weight_patterns(model: nn.Module, kinds: frozenset[str] = CONVS_AND_LINEARS) -> list[str]:
    """Return patterns of the layers of some kinds that are in a model."""
    types = [kind for name in sorted(kinds) if name in LAYERS for kind in LAYERS[name]]
    there = [kind for kind in types if any(isinstance(item, kind) for item in model.modules())]
    if not there:
        raise ConfigError("the network has no layer that this method serves")
    return [f"type:{kind.__name__}" for kind in there]


def vectors_of(model: nn.Module) -> list[str]:
    """Return the parameters that are vectors and no layer's weight."""
    weights = {id(p) for layer in _layers(model) for p in (layer.weight,)}
    return [
        name
        for name, p in model.named_parameters()
        if sum(side > 1 for side in p.shape) <= 1 and id(p) not in weights
    ]


def _layers(model: nn.Module) -> list[nn.Module]:
    return [item for item in model.modules() if isinstance(item, nn.Conv2d | nn.Linear)]


def _count(model: nn.Module, names: list[str]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def _of_rank(sizes: list[LayerSize], rank: int) -> Allocation:
    """Return one rank for all layers, cut where a layer has no such rank."""
    ranks = {size.name: min(rank, size.largest) for size in sizes}
    dense = frozenset(size.name for size in sizes if size.dense(ranks[size.name]))
    return Allocation(ranks, dense, sum(size.cost(ranks[size.name]) for size in sizes))


def _within(
    sizes: list[LayerSize],
    room: int,
    total: int,
    scores: Mapping[str, float] | None,
    *,
    gamma: float,
    beta: float,
    least: int,
) -> Allocation:
    """Return ranks under what the extras left of the budget; uniform ones without scores."""
    try:
        if scores is None:
            return uniform(sizes, max(room, 0))
        return allocate(sizes, scores, max(room, 0), gamma=gamma, beta=beta, least=least)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The extras (biases, norms, scales) are part of the budget; raise --budget "
            f"(of {total:,} parameters) or leave them out with --extras false"
        ) from error


def _whole(model: nn.Module, method: str) -> frozenset[str]:
    """Return the layers whose weights are trained as a whole."""
    names = [match.name for match in find_targets(model, weight_patterns(model))]
    found = [name for name in names if method != DECODER or name.startswith(DECODING)]
    if not found:
        raise ConfigError(
            "decoder is known for NAFNet and Restormer; this network has no part that begins with "
            + ", ".join(DECODING)
        )
    return frozenset(found)


def _registered(model: nn.Module, method: str, options: Mapping[str, Any]) -> dict[str, int]:
    """Inject a method on every layer that it can serve, and return the ranks, if it has one."""
    recipe = parse(method)
    config = recipe.config(**options)
    served, refusal = [], None
    for match in find_targets(model, weight_patterns(model, config.kinds), (), config.kinds):
        try:
            for key in match.keys:
                config.check_site(describe(match.name, match.module, key))
            served.append(match.name)
        except ConfigError as error:
            refusal = error
    if not served:
        assert refusal is not None
        raise ConfigError(f"{method} can serve no layer of this network: {refusal}")
    init = recipe.init if recipe.init is not None and not recipe.init.needs else None
    vl.inject(model, config, served, init=init)
    return {place.path: place.delta.config.rank for place in _with_rank(model)}


def _with_rank(model: nn.Module) -> list[Any]:
    return [place for place in places_of(model) if hasattr(place.delta.config, "rank")]


def _uncovered(model: nn.Module, names: list[str]) -> list[str]:
    """Leave out what an adapter changes already: biases, and weights of norms."""
    changed = set()
    for place in places_of(model):
        if place.delta.bias_change() is not None:
            changed.add(f"{place.path}.bias")
        if place.site.kind == "norm":
            changed.add(f"{place.path}.weight")
    return [name for name in names if name not in changed]


@torch.no_grad()
def _start_afresh(base: Base, seed: int) -> None:
    """Set everything that is trained so that the network is a fresh one."""
    if base.spec is None:
        raise ConfigError("scratch needs a network of this project: NAFNet or Restormer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = dict(base.spec.build().named_parameters())
    for place in places_of(base.model):
        name = f"{place.path}.weight"
        change = fresh.pop(name) - base.model.get_parameter(name)
        place.delta.get_parameter("D").copy_(view_of(change, place.site))
    for name, value in fresh.items():
        base.model.get_parameter(name).copy_(value)
