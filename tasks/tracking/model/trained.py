"""What was trained before, from a file of either format: the published one or this project's.

A file decides which adapter a tracker has. A method that is said beside it has to be the file's,
so that training goes on with what there is; only a file of types and head alone takes any method.
"""

from pathlib import Path
from typing import Any

import visionlora as vl
from tasks.tracking.model.adapter import AUTO, METHOD, add_adapter
from tasks.tracking.model.export import layout_of
from tasks.tracking.model.lorat import ADAPTED, LoRAT
from tasks.tracking.model.released import Released, read_released
from visionlora.compose import parse
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.io.safetensors_file import metadata_of
from visionlora.record import hosts_of
from visionlora.registry import build_config


def open_trained(path: str | Path) -> Released | Path:
    """Return a checked file of the published format, or the path of one of ours.

    Raises:
        DataError: it cannot be read.
        AdapterFileError: it is incomplete, or of another format.
    """
    path = Path(path).expanduser()
    return path if "visionlora" in metadata_of(path) else read_released(path)


def load_trained(
    model: LoRAT, file: Released | Path, method: str | None = AUTO, **options: Any
) -> None:
    """Put what a file holds into a tracker without an adapter.

    Args:
        model: the tracker; changed in place.
        file: from `open_trained`.
        method: `auto`, or the recipe of the file's adapter; None is for files without one.
        **options: options of the method, and those of `add_adapter`.

    Raises:
        AdapterFileError: the file is for another model.
        ConfigError: a method or an option that is not the file's.
    """
    if isinstance(file, Released):
        _load_released(model, file, method, options)
    elif method is None:
        raise ConfigError(f"{file} holds an adapter; leave method out")
    else:
        _load_native(model, file, method, options)


def _load_native(model: LoRAT, file: Path, method: str, options: dict[str, Any]) -> None:
    recipe = parse(METHOD if method == AUTO else method)
    if recipe.options or options.keys() - {"usual_rank", "seed"}:
        add_adapter(model, recipe.text, **options)  # so that reading compares what is said
    vl.load(model, file)
    found = {slot.delta.config.method for host in hosts_of(model).values() for slot in host.slots}
    if method != AUTO and found != {recipe.method}:
        raise ConfigError(f"{file} holds {', '.join(sorted(found))}, not {recipe.method}")


def _load_released(
    model: LoRAT, file: Released, method: str | None, options: dict[str, Any]
) -> None:
    file.check(layout_of(model), "this one")
    if file.frozen:
        file.copy_frozen(model)
    if file.rank:
        vl.inject(model, _lora_of(file, method, options), ADAPTED)
    elif method not in (None, AUTO):
        add_adapter(model, str(method), **options)
    file.copy_trained(model)


def _lora_of(file: Released, method: str | None, options: dict[str, Any]) -> AdapterConfig:
    """Return the configuration of the LoRA in a file."""
    if method is None:
        raise ConfigError(f"{file.path} holds LoRA of rank {file.rank}; leave method out")
    recipe = parse(METHOD if method == AUTO else method)
    if recipe.method != "lora":
        raise ConfigError(f"{file.path} holds LoRA, not {recipe.method}")
    said = {**recipe.options, **options}
    said.pop("usual_rank", None)
    rank = said.setdefault("rank", file.rank)
    if rank != file.rank:
        raise ConfigError(f"{file.path} has rank {file.rank}, not {rank}; leave rank out")
    if file.scales is not None:  # the file's word counts, and not what is said of alpha
        said |= {"alpha": file.alpha, "scaling": "standard"}
    return build_config("lora", said)
