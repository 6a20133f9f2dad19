"""One adapter out of several: stack the factors of every site, then compress once.

    sum_k w_k s_k B_k A_k = [w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n]

The sum is exact at the summed rank; `rank`, `energy` or `budget` shorten it as `squeeze` does. An
adapter counts with the strength that `set_scale` gave it. Methods without a factor form (DoRA: its
changes do not add up) are refused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from visionlora.api import use
from visionlora.build import install, prepare_adapter, refuse_merged
from visionlora.errors import ConfigError
from visionlora.hosts import find_adapter
from visionlora.ranks.allocation import Request, SqueezeReport, report
from visionlora.ranks.factors import stack
from visionlora.ranks.squeeze import factors_of
from visionlora.ranks.structure import places_of
from visionlora.record import adapter_names
from visionlora.registry import build_config
from visionlora.sites import Site


def combine(
    model: nn.Module,
    names: Sequence[str],
    *,
    into: str = "combined",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> SqueezeReport:
    """Add a plain LoRA whose change is the weighted sum of other adapters, and make it active.

    The others stay in the model, inactive.

    Args:
        model: a model with the adapters, unmerged.
        names: the adapters.
        into: name of the new adapter.
        weights: one number per adapter; 1 each if omitted.
        rank: see `squeeze`.
        energy: see `squeeze`.
        budget: see `squeeze`.

    Raises:
        ConfigError: fewer than two adapters, weights of another number, or a wrong rank request.
        AdapterStateError: an unknown adapter, one without a factor form, or a merged model.
    """
    request = Request(rank, energy, budget)
    refuse_merged(model, "combine")
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    names = [find_adapter(adapter_names(model), name) for name in wanted]
    if len(names) < 2:
        raise ConfigError(f"combine: give at least two adapters, got {names}")
    if weights is not None and len(weights) != len(names):
        raise ConfigError(f"combine: {len(names)} adapters need as many weights, got {weights}")
    if not all(isinstance(item, int | float) and math.isfinite(item) for item in weights or ()):
        raise ConfigError(f"combine: weights must be finite numbers, got {weights}")
    sites: dict[str, Site] = {}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        for place in places_of(model, name):
            site = replace(place.site, module=place.path)
            sites[site.name] = site
            up, down = factors_of(place)
            scale = weight * place.host.state.strengths[name] * place.delta.scale
            pairs.setdefault(site.name, []).append((scale * up, down))
    spectra = [request.spectrum(place, *stack(found), 1.0) for place, found in pairs.items()]
    ranks = request.ranks(spectra)
    if not any(ranks):
        raise ConfigError(f"combine: the changes of {', '.join(names)} are zero at every site")
    plan = [
        (sites[item.site], build_config("lora", {"rank": rank}))
        for item, rank in zip(spectra, ranks, strict=True)
        if rank
    ]
    prepared = prepare_adapter(model, plan, name=into)
    kept = {item.site: item.triples.pair(rank) for item, rank in zip(spectra, ranks, strict=True)}
    with torch.no_grad():
        for group in prepared.deltas.values():
            for site, delta in group.values():
                for key, value in zip(("B", "A"), kept[site.name], strict=True):
                    delta.get_parameter(key).copy_(value)
    install(model, prepared)
    use(model, into)
    return report(spectra, ranks)
