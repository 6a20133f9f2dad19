"""A tracker by name, with its adapter: from a variant, a recipe and files to a model that runs.

The recipe is any method of the registry, `dora` or `block-lora+glad` as well as LoRAT's own
`lorat`, which is LoRA that starts with both factors from N(0, 0.02^2). Only the method and a start
that needs no data act here; `recipe.build_dynamics` and data-driven starts belong to training.
"""

from pathlib import Path
from typing import Any

import torch

import visionlora as vl
from tasks.tracking.model.backbone import blank, load_backbone
from tasks.tracking.model.embedding import PosMode
from tasks.tracking.model.export import layout_of
from tasks.tracking.model.keys import Layout
from tasks.tracking.model.lorat import ADAPTED, TRAINED, LoRAT
from tasks.tracking.model.released import Released, read_released
from tasks.tracking.model.variants import VARIANTS, Variant, find_variant
from visionlora.compose import Recipe, parse
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.io.safetensors_file import metadata_of
from visionlora.registry import build_config, get_method

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
        backbone_weights: `hub`, `embedded` (tiny), `random` or a file, see `backbone.py`.
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
    file = None if weights is None else _open(weights, variant, method)
    where = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
    if isinstance(file, Released) and file.frozen and backbone_weights is None:
        backbone = blank(variant, where)  # the file has it
    else:
        backbone = load_backbone(variant, backbone_weights, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LoRAT(backbone, variant.shape, pos_mode=pos_mode, drop_path=variant.drop_path)
    if isinstance(file, Released):
        load_released(model, file, method, seed=seed, **options)
    elif method is not None and (file is None or method != METHOD):
        add_adapter(model, method, usual_rank=variant.rank, seed=seed, **options)
    if isinstance(file, Path):
        vl.load(model, file)
    vl.freeze_base(model, TRAINED)
    return model.to(device).eval()


def add_adapter(
    model: LoRAT,
    method: str = METHOD,
    *,
    usual_rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Recipe:
    """Put an adapter of any method into a tracker's blocks; return its recipe.

    Args:
        model: the tracker; changed in place.
        method: method or product, see `visionlora.compose`.
        usual_rank: the rank, unless the recipe or an option says otherwise.
        seed: of the adapter.
        **options: options of the method.
    """
    recipe = parse(method)
    kind = get_method(recipe.method).config
    said = {**recipe.implied, **recipe.options, **options}
    if usual_rank is not None and "rank" in kind.__dataclass_fields__ and "rank" not in said:
        options["rank"] = usual_rank
    config = recipe.config(**options, seed=seed)
    vl.inject(model, config, NORMS if config.kinds == {"norm"} else ADAPTED)
    start = recipe.init
    on_meta = model.embedding.positions.is_meta
    if start is not None and not start.needs and not on_meta:
        vl.initialise(model, start)
    return recipe


def load_released(
    model: LoRAT, file: Released, method: str | None = METHOD, *, seed: int = 0, **options: Any
) -> None:
    """Put what a file of the official format holds into a tracker without an adapter.

    Args:
        model: the tracker; changed in place.
        file: what was read.
        method: LoRA by any name, with the file's rank; its alpha counts where the file has none.
        seed: of the adapter, which dropout aside has no effect.
        **options: options of LoRA.

    Raises:
        AdapterFileError: the file is for another model.
        ConfigError: a method or a rank that the file does not hold.
    """
    file.check(layout_of(model), "this one", KNOWN)
    if file.frozen:
        file.copy_frozen(model)
    if file.rank:
        config = _lora_of(file, method, options, seed)
        vl.inject(model, config, ADAPTED)
    file.copy_trained(model)


def _open(path: str | Path, variant: Variant, method: str | None) -> Released | Path:
    """Return a checked file of the official format, or the path of one of ours."""
    path = Path(path).expanduser()
    if "visionlora" in metadata_of(path):
        if method is None:
            raise ConfigError(f"{path} holds an adapter; leave method out")
        return path
    file = read_released(path)
    file.check(KNOWN.get(variant.name, file.layout), variant.name, KNOWN)
    return file


def _lora_of(
    file: Released, method: str | None, options: dict[str, Any], seed: int
) -> AdapterConfig:
    """Return the configuration of the LoRA in a file.

    Raises:
        ConfigError: another method, another rank, or none at all.
    """
    if method is None:
        raise ConfigError(f"{file.path} holds LoRA of rank {file.rank}; leave method out")
    recipe = parse(method)
    if recipe.method != "lora":
        raise ConfigError(f"{file.path} holds LoRA, not {recipe.method}")
    said = {**recipe.options, **options}
    rank = said.setdefault("rank", file.rank)
    if rank != file.rank:
        raise ConfigError(f"{file.path} has rank {file.rank}, not {rank}; leave rank out")
    if file.scales is not None:  # the file's word counts
        said |= {"alpha": file.alpha, "scaling": "standard"}
    return build_config("lora", {**said, "seed": seed})


KNOWN = {
    name: Layout(v.width, v.depth, v.into, v.out_of, v.shape.search_grid)
    for name, v in VARIANTS.items()
}
"""Layouts of the variants, to say which of them a file is for."""
