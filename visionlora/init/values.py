"""One Delta with the start of an initialiser."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.init.base import Given, Initialiser, SiteStats, Start
from visionlora.methods.base import Delta
from visionlora.methods.parts.pair import PairDelta
from visionlora.sites import Site, named_generator


@dataclass(frozen=True)
class Started:
    """A new Delta, and the size of its first change relative to the weight."""

    delta: Delta
    change: float


def with_rank(delta: Delta, ranks: Mapping[str, int] | None, name: str) -> AdapterConfig | None:
    """Return the configuration of a site at the rank it was given, or None if that is 0.

    The scale stays what it was.
    """
    config = delta.config
    if ranks is None:
        return config
    rank = ranks[name]
    if not rank:
        return None
    root = 0.5 if getattr(config, "scaling", "standard") == "rslora" else 1.0
    return dataclasses.replace(config, rank=rank, alpha=delta.scale * rank**root)  # type: ignore[call-arg]


def with_start(
    initialiser: Initialiser,
    build: Callable[[AdapterConfig], Delta],
    module: nn.Module,
    site: Site,
    config: AdapterConfig,
    stats: SiteStats,
) -> Started:
    """Return a new Delta of one site with the start of an initialiser.

    Args:
        initialiser: what to start with.
        build: makes a Delta of a configuration for the site.
        module: the layer.
        site: the weight view.
        config: configuration of the Delta; where the start is taken off it gets an offset.
        stats: what data said about the site.

    Raises:
        ConfigError: the weight or the statistics cannot start the site.
    """
    weight = view_of(stored(module, parameter_name(module, site.key)).detach(), site)
    plain = build(config)
    down = cast(Tensor, getattr(plain, "A", None))
    given = Given(
        site=site,
        form=config.form,
        weight=_exact(weight, site),
        rank=down.shape[0],
        scale=plain.scale,
        generator=named_generator(config.seed, f"{initialiser.name}:{site.name}"),
        stats=stats,
        arms=getattr(plain, "arms", 1),
    )
    start = initialiser.start(given)
    _check_finite(start, initialiser, given)
    delta = plain
    if start.taken_off:
        delta = build(dataclasses.replace(config, offset=given.rank))  # type: ignore[call-arg]
    cast(Any, delta).begin(start, weight)
    return Started(delta, 0.0 if start.taken_off else _relative_change(delta, given))


def _relative_change(delta: Delta, given: Given) -> float:
    """Return the norm of the first change over that of the weight."""
    pair = delta.inner_pair() if isinstance(delta, PairDelta) else delta.factors()
    assert pair is not None
    up, down = (item.detach().to("cpu", torch.float64) for item in pair)
    return abs(given.scale) * float((up @ down).norm()) / max(float(given.weight.norm()), 1e-30)


def _exact(weight: Tensor, site: Site) -> Tensor:
    if weight.is_meta:
        raise ConfigError(
            f"the weight of {site.name or 'the layer'} has no values yet (meta device): load them "
            "first"
        )
    return weight.to("cpu", torch.float64)


def _check_finite(start: Start, initialiser: Initialiser, given: Given) -> None:
    for value in (start.up, start.down, start.core):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ConfigError(
                f"{initialiser.name}: the start of {given.where} holds NaN or infinity"
            )
