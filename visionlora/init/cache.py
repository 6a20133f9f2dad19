"""Statistics in a safetensors file, so that a pass over data is made once.

Metadata: `format`, the `key` of what was collected, the `figures` of the pass, and a `layout` that
names the tensors of every site (sites that share an input share a tensor). The key is a digest of
the base model, the batches, the loss function and all options of the pass; whatever changes a
number changes the key.

| file | what happens |
|---|---|
| of this key | it is used |
| of another key | a warning; the statistics are collected again and replace it |
| damaged: no safetensors file, or tensors missing, misshapen or not finite | the same |
| a sound safetensors file that holds something else, such as a model | refused, never replaced |

Files are written completely or not at all. Nothing is ever unpickled.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from visionlora.errors import OutputError
from visionlora.init.base import Components, Need, SiteStats
from visionlora.io.atomic import write_atomically

logger = logging.getLogger("visionlora")

FORMAT = "visionlora-statistics-1"
FIGURES = ("loss", "batches", "samples")
_COMPONENTS = ("vectors", "singular", "ratio")

Layout = dict[str, dict[str, str]]
"""`{site: {kind of tensor: key in the file}}`."""


@dataclass(frozen=True)
class Cached:
    """What a file holds."""

    sites: dict[str, SiteStats]
    figures: dict[str, float]


def check_target(path: str | Path) -> None:
    """Refuse a path where something else than statistics may lie.

    Raises:
        OutputError: a sound safetensors file of another kind, a folder, or another ending.
    """
    if Path(path).suffix != ".safetensors":
        raise OutputError(f"a file of statistics must end in .safetensors, got {path}")
    if Path(path).is_dir():
        raise OutputError(f"cannot write statistics to {path}: it is a folder")
    metadata = _metadata(path)
    if metadata is not None and not metadata.get("format", "").startswith("visionlora-statistics"):
        raise OutputError(f"{path} is a safetensors file of something else: it is not replaced")


def read(
    path: str | Path, key: str, needs: Collection[Need], shapes: Mapping[str, tuple[int, int]]
) -> Cached | None:
    """Return the statistics of a key, or None (with a warning if there is another or a bad file).

    Args:
        path: the file; it need not exist.
        key: digest of what is wanted.
        needs: what every site must have.
        shapes: `(out, in)` of every site that must be there.
    """
    if not Path(path).exists():
        return None
    metadata = _metadata(path)
    if metadata is not None and (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
        why = "is of another model, other data or other options"
    else:
        found = None if metadata is None else _sound(path, metadata, needs, shapes)
        if found is not None:
            return found
        why = "is damaged"
    logger.warning("the statistics in %s cannot be used: the file %s; collecting again", path, why)
    return None


def _sound(
    path: str | Path,
    metadata: Mapping[str, str],
    needs: Collection[Need],
    shapes: Mapping[str, tuple[int, int]],
) -> Cached | None:
    """Return what a file of the right key holds, None if it is not all there."""
    try:
        with safetensors.safe_open(Path(path), "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        found = _unpack(json.loads(metadata["layout"]), tensors)
        known = json.loads(metadata["figures"])
        figures = {name: float(known[name]) for name in FIGURES}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = found.keys() == shapes.keys() and all(
        all(getattr(stats, need) is not None for need in needs) and _fits(stats, *shapes[name])
        for name, stats in found.items()
    )
    return Cached(found, figures) if whole else None


def write(
    path: str | Path, key: str, sites: Mapping[str, SiteStats], figures: Mapping[str, float]
) -> None:
    """Write statistics under a key.

    Raises:
        OutputError: the file cannot be written.
    """
    layout, tensors = _pack(sites)
    metadata = {
        "format": FORMAT,
        "key": key,
        "layout": json.dumps(layout),
        "figures": json.dumps(dict(figures)),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _pack(sites: Mapping[str, SiteStats]) -> tuple[Layout, dict[str, Tensor]]:
    layout: Layout = {}
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for site, stats in sites.items():
        layout[site] = {}
        for kind, tensor in _tensors(stats).items():
            if id(tensor) not in names:
                names[id(tensor)] = f"{site}.{kind}"
                tensors[names[id(tensor)]] = tensor.contiguous()
            layout[site][kind] = names[id(tensor)]
    return layout, tensors


def _unpack(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, SiteStats]:
    sites = {}
    for site, names in layout.items():
        held = {kind: tensors[name] for kind, name in names.items()}
        whole = all(kind in held for kind in _COMPONENTS)
        parts = Components(*(held[kind] for kind in _COMPONENTS)) if whole else None
        sites[site] = SiteStats(held.get("gradient"), held.get("covariance"), parts)
    return sites


def _tensors(stats: SiteStats) -> dict[str, Tensor]:
    values: dict[str, Any] = {"gradient": stats.gradient, "covariance": stats.covariance}
    if stats.components is not None:
        values |= {kind: getattr(stats.components, kind) for kind in _COMPONENTS}
    return {kind: value for kind, value in values.items() if value is not None}


def _fits(stats: SiteStats, out: int, into: int) -> bool:
    """Whether the tensors of a site have its shape and are finite."""
    values = _tensors(stats)
    k = len(stats.components.vectors) if stats.components is not None else 0
    wanted = {"gradient": (out, into), "covariance": (into, into), "vectors": (k, into)}
    return all(
        tuple(value.shape) == wanted.get(kind, (k,)) and bool(torch.isfinite(value).all())
        for kind, value in values.items()
    )


def _metadata(path: str | Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file, None if the path is none that can be read."""
    try:
        with safetensors.safe_open(Path(path), "pt") as stream:
            return dict(stream.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return None
