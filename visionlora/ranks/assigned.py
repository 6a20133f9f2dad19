"""LoRA with a rank for every layer, as CoLoRA and other allocations decide it.

r_i = 0             the layer stays frozen
r_i (d + k) < d k   a factor pair of rank r_i, s = alpha / r_i
otherwise           the whole matrix: it holds no more numbers and can be anything (`full`)
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from visionlora.build import install, prepare_adapter
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError, nearest
from visionlora.hosts import Mode, describe
from visionlora.ranks.contribution import LayerSize
from visionlora.registry import build_config
from visionlora.targets import find_targets


def inject_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    name: str = "default",
    method: str = "lora",
    mode: Mode = "auto",
    **options: Any,
) -> nn.Module:
    """Add an adapter whose rank is given layer by layer, and freeze the rest of the model.

    Args:
        model: any module; changed in place.
        ranks: rank by dotted layer name; layers that are not named stay frozen, as those of rank 0.
        name: name of the adapter.
        method: a method with a rank.
        mode: see `inject`.
        **options: other options of the method.

    Returns:
        The same model.

    Raises:
        ConfigError: a name that is no layer, a rank that is negative or too large, no rank above
            zero, or a method without rank.
    """
    known = {path: module for path, module in model.named_modules() if path}
    plan: list[tuple[Any, AdapterConfig]] = []
    for path, rank in ranks.items():
        if path not in known:
            raise ConfigError(f"there is no layer {path!r}{nearest(path, known)}")
        if not isinstance(rank, int) or rank < 0:
            raise ConfigError(f"the rank of {path} must be a whole number from 0 on, got {rank!r}")
        if not rank:
            continue
        match = next(item for item in find_targets(model, path) if item.name == path)
        site = describe(path, match.module, "weight")
        size = LayerSize(path, site.out_features, site.in_features)
        config = build_config(method, {**options, "rank": rank})
        if rank > size.largest:
            config.check_site(site)
        seed = {"seed": options["seed"]} if "seed" in options else {}
        plan.append((site, build_config("full", seed) if size.dense(rank) else config))
    if not plan:
        raise ConfigError("no layer has a rank above zero: nothing would be trained")
    return install(model, prepare_adapter(model, plan, name=name, mode=mode))
