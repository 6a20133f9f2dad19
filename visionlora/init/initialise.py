"""Giving an adapter other initial values: collect what the initialiser needs, compute, then set.

Everything is computed for all sites before the first value is set, so a refusal leaves the model as
it was. Every Delta becomes a new one: call `initialise` before the optimiser is built.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from visionlora.build import PreparedAdapter, build_delta, refuse_merged
from visionlora.config import AdapterConfig
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.hosts import find_adapter
from visionlora.init.base import Initialiser, SiteStats
from visionlora.init.suitable import check_form, check_weights
from visionlora.init.values import Started, with_rank, with_start
from visionlora.ranks.structure import Place, places_of
from visionlora.record import adapter_names
from visionlora.registry import build_initialiser


@dataclass(frozen=True)
class InitReport:
    """What `initialise` did."""

    init: str
    """Initialiser with its options."""
    change: Mapping[str, float]
    """Norm of the first change of every site, relative to that of its weight."""
    ranks: Mapping[str, int]
    """Rank of every site; one that lost its adapter has 0."""
    loss: float | None = None
    """Mean loss of the base model over the batches that were looked at."""


def initialise(
    model: nn.Module,
    init: str | Initialiser,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    name: str | None = None,
    count: int | None = None,
    sketch: int | None = None,
    cache: str | Path | None = None,
    **options: Any,
) -> InitReport:
    """Give an adapter the start of an initialiser; call it before the optimiser is built.

    Args:
        model: a model with an adapter; changed in place.
        init: registered name (`pissa`, `lora-ga`, `eva`, ...), or an initialiser.
        batches: training batches, for initialisers that look at data.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch as in training.
        name: which adapter; may be omitted if there is one.
        count: number of batches to look at; all of them by default.
        sketch: keep only a sketch of so many columns of every gradient, for large models.
        cache: a safetensors file that keeps the statistics for the next run.
        **options: options of the initialiser, such as `gamma=64`.

    Raises:
        ConfigError: unknown name or option, a method that it cannot start, missing data, or a
            weight or gradient that starts nothing; the model is unchanged then.
        DataError: too few batches, or one whose loss is not finite.
        AdapterStateError: no such adapter, or the model is merged.
    """
    refuse_merged(model, "initialise")
    initialiser = build_initialiser(init, options)
    adapter = _choose(model, name)
    places = places_of(model, adapter)
    for config in dict.fromkeys(place.delta.config for place in places):
        check_form(initialiser, config)
    check_weights(model, initialiser, [(cast(nn.Module, p.host), p.site) for p in places])
    stats, loss = _statistics(model, initialiser, batches, loss_fn, adapter, count, sketch, cache)
    configs = {place.name: place.delta.config for place in places}
    ranks = initialiser.ranks(configs, stats)
    planned = [(p, c) for p in places if (c := with_rank(p.delta, ranks, p.name)) is not None]
    if not planned:
        raise ConfigError(f"{initialiser.name} would leave adapter {adapter!r} without a site")
    made = [(p, _start(p, config, initialiser, stats)) for p, config in planned]
    kept = {place.name for place, _ in made}
    for place in places:
        if place.name not in kept:
            place.remove()
    for place, started in made:
        place.put(started.delta)
    found = {place.name: int(getattr(s.delta.config, "rank", 0)) for place, s in made}
    return InitReport(
        initialiser.describe(),
        {place.name: started.change for place, started in made},
        {name: found.get(name, 0) for name in configs},
        loss,
    )


def initialise_prepared(
    model: nn.Module, prepared: PreparedAdapter, initialiser: Initialiser
) -> PreparedAdapter:
    """Give an adapter that is not yet part of a model the start of an initialiser.

    Raises:
        ConfigError: the initialiser looks at data, or cannot start the method or a weight.
    """
    if initialiser.needs:
        raise ConfigError(
            f"{initialiser.name} looks at data: inject the method first, and then call "
            f"initialise(model, {initialiser.name!r}, batches, loss_fn)"
        )
    sites = [
        (model.get_submodule(path), site)
        for path, group in prepared.deltas.items()
        for site, _ in group.values()
    ]
    check_weights(model, initialiser, sites)
    for path, group in prepared.deltas.items():
        module = model.get_submodule(path)
        for key, (site, delta) in group.items():
            check_form(initialiser, delta.config)

            def build(config: AdapterConfig) -> Any:
                return build_delta(module, site, config, None)  # noqa: B023

            started = with_start(initialiser, build, module, site, delta.config, SiteStats())
            group[key] = (site, started.delta)
    return prepared


def _statistics(
    model: nn.Module,
    initialiser: Initialiser,
    batches: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    adapter: str,
    count: int | None,
    sketch: int | None,
    cache: str | Path | None,
) -> tuple[Mapping[str, SiteStats], float | None]:
    """Return the statistics by place and the mean loss, nothing where none are needed."""
    asked = {"count": count, "sketch": sketch, "cache": cache}
    given = [name for name, value in asked.items() if value is not None]
    if not initialiser.needs:
        if given:
            raise ConfigError(
                f"{initialiser.name} does not look at data, so {given[0]} has no effect; leave it "
                "out"
            )
        return {}, None
    if count is not None and count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    if batches is None or loss_fn is None:
        raise ConfigError(
            f"{initialiser.name} looks at data: call initialise(model, {initialiser.name!r}, "
            "batches, loss_fn) with training batches and their loss"
        )
    if sketch is not None and not (initialiser.sketchable and "gradient" in initialiser.needs):
        what = "whole gradients" if "gradient" in initialiser.needs else "no gradients"
        raise ConfigError(f"{initialiser.name} needs {what}: leave sketch out")
    from visionlora.init.stats import collect  # it uses the verbs, which use this file

    found = collect(
        model,
        batches,
        loss_fn,
        needs=initialiser.needs,
        name=adapter,
        count=count,
        sketch=sketch,
        components=initialiser.components,
        steady=initialiser.steady,
        cache=cache,
    )
    return found.sites, found.loss


def _start(
    place: Place,
    config: AdapterConfig,
    initialiser: Initialiser,
    stats: Mapping[str, SiteStats],
) -> Started:
    found = stats.get(place.name, SiteStats())
    module = cast(nn.Module, place.host)
    return with_start(initialiser, place.build, module, place.site, config, found)


def _choose(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is not None:
        return find_adapter(names, name)
    if len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    return names[0]
