"""A tracker by name, with its adapter: from a variant, a recipe and files to a model that runs.

The recipe is any method of the registry, `dora` or `block-lora+glad` as well as LoRAT's own
`lorat`, which is LoRA that starts with both factors from N(0, 0.02^2). Only the method and a start
that needs no data act here; `recipe.build_dynamics` and data-driven starts belong to training.
"""

from pathlib import Path
from typing import Any

import torch

import visionlora as vl
from tasks.tracking.model.backbone import HUB, load_backbone
from tasks.tracking.model.embedding import PosMode
from tasks.tracking.model.lorat import ADAPTED, TRAINED, LoRAT
from tasks.tracking.model.variants import Variant, find_variant
from visionlora.compose import Recipe, parse
from visionlora.registry import get_method

METHOD = "lorat"
"""LoRAT's own recipe."""
NORMS = ("blocks.*.norm1", "blocks.*.norm2")
"""Targets of methods that serve norms only."""


def build(
    variant: str | Variant,
    *,
    method: str | None = METHOD,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    pos_mode: PosMode = "resample",
    seed: int = 0,
    device: str | torch.device = "cpu",
    **options: Any,
) -> LoRAT:
    """Return a tracker with everything frozen but adapter, token types and head.

    Args:
        variant: a name of `VARIANTS`.
        method: recipe of the adapter; None trains types and head alone.
        weights: a trained tracker, in LoRAT's published format or in this project's.
        backbone_weights: `hub`, `random` or a file; default the hub.
        pos_mode: how positions come to the search grid, see `embedding.py`.
        seed: of token types, head and adapter.
        device: where it ends up; `meta` for counting only.
        **options: options of the method beside those in the recipe; the rank is the variant's
            unless said.

    Raises:
        ConfigError: an unknown name or option, or weights that cannot be found.
        VisionLoraError: files that do not fit.
    """
    variant = find_variant(variant) if isinstance(variant, str) else variant
    where = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
    backbone = load_backbone(variant, backbone_weights or HUB, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LoRAT(backbone, variant.shape, pos_mode=pos_mode, drop_path=variant.drop_path)
    if method is not None:
        add_adapter(model, method, rank=variant.rank, seed=seed, **options)
    vl.freeze_base(model, TRAINED)
    return model.to(device).eval()


def add_adapter(
    model: LoRAT, method: str = METHOD, *, rank: int | None = None, seed: int = 0, **options: Any
) -> Recipe:
    """Put an adapter of any method into a tracker's blocks; return its recipe.

    Args:
        model: the tracker; changed in place.
        method: method or product, see `visionlora.compose`.
        rank: what a rank is unless the recipe or an option says otherwise.
        seed: of the adapter.
        **options: options of the method.
    """
    recipe = parse(method)
    kind = get_method(recipe.method).config
    said = {**recipe.implied, **recipe.options, **options}
    if rank is not None and "rank" in kind.__dataclass_fields__ and "rank" not in said:
        options["rank"] = rank
    config = recipe.config(**options, seed=seed)
    vl.inject(model, config, NORMS if config.kinds == {"norm"} else ADAPTED)
    start = recipe.init
    on_meta = model.embedding.positions.is_meta
    if start is not None and not start.needs and not on_meta:
        vl.initialise(model, start)
    return recipe
