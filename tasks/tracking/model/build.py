"""A tracker by name: from a variant, a recipe and files to a model that runs.

The recipe is any method of the registry, `dora` or `block-lora+glad` as well as LoRAT's own
(`adapter.py`); what was trained before comes from a file of either format (`trained.py`).
"""

from pathlib import Path
from typing import Any

import torch

import visionlora as vl
from tasks.tracking.model.adapter import AUTO, METHOD, add_adapter
from tasks.tracking.model.backbone import blank, load_backbone
from tasks.tracking.model.embedding import PosMode
from tasks.tracking.model.lorat import TRAINED, LoRAT
from tasks.tracking.model.released import LAYOUTS, Released
from tasks.tracking.model.trained import load_trained, open_trained
from tasks.tracking.model.variants import Variant, find_variant

__all__ = ["AUTO", "METHOD", "add_adapter", "build"]


def build(
    variant: str | Variant,
    *,
    method: str | None = AUTO,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    pos_mode: PosMode = "resample",
    seed: int = 0,
    device: str | torch.device = "cpu",
    lean: bool = False,
    **options: Any,
) -> LoRAT:
    """Return a tracker with everything frozen but adapter, token types and head.

    Args:
        variant: a name of `VARIANTS`.
        method: recipe of the adapter; None trains types and head alone, `auto` is what `weights`
            hold, and without them LoRAT's own.
        weights: a trained tracker, in LoRAT's published format or in this project's.
        backbone_weights: `hub`, `embedded` (tiny), `random` or a file, see `backbone.py`.
        pos_mode: how positions come to the search grid, see `embedding.py`.
        seed: of token types, head and adapter.
        device: where it ends up; `meta` for counting only.
        lean: train with lean activations, see `visionlora.lean`.
        **options: options of the method beside those in the recipe; the rank is the variant's
            unless said.

    Raises:
        ConfigError: an unknown name or option, weights that cannot be found, or an adapter that
            cannot be lean.
        VisionLoraError: files that do not fit.
    """
    variant = find_variant(variant) if isinstance(variant, str) else variant
    file = None if weights is None else open_trained(weights)
    if isinstance(file, Released):  # before a large backbone is built
        file.check(LAYOUTS.get(variant.name, file.layout), variant.name)
    where = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
    if isinstance(file, Released) and file.frozen and backbone_weights is None:
        backbone = blank(variant, where)  # the file has it
    else:
        backbone = load_backbone(variant, backbone_weights, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LoRAT(backbone, variant.shape, pos_mode=pos_mode, drop_path=variant.drop_path)
    if file is not None:
        load_trained(model, file, method, usual_rank=variant.rank, seed=seed, **options)
    elif method is not None:
        method = METHOD if method == AUTO else method
        add_adapter(model, method, usual_rank=variant.rank, seed=seed, **options)
    if lean:
        vl.make_lean(model)
    vl.freeze_base(model, TRAINED)
    return model.to(device).eval()
