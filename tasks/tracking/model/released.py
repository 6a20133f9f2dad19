"""LoRAT's published files: reading and checking them (`export.py` writes them).

They hold what was trained, under the names of `keys.py`, and are safetensors whatever their suffix
says (older ones are pickles, read with `weights_only=True`). The backbone is not in them, nor are
the positions, which follow from it. Checkpoints of the official code that were saved in full have
both as well; then no other weights are needed.

The change of a layer is `s B A` with `s = alpha / r`, or `alpha / sqrt(r)` where `use_rslora` is
set. Both numbers stand in full files for the model (`lora_alpha`, `use_rslora`) or for one layer
(`<layer>.lora.alpha`); where they are missing, alpha is r.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.tracking.model import keys
from tasks.tracking.model.keys import Layout
from tasks.tracking.model.lorat import LoRAT
from tasks.tracking.model.tensors import fill, read_tensors
from tasks.tracking.model.variants import VARIANTS
from visionlora.errors import AdapterFileError

ADAPTER = "default"
"""Name of the adapter inside a tracker."""
LAYOUTS = {
    name: Layout(item.width, item.depth, item.into, item.out_of, item.shape.search_grid)
    for name, item in VARIANTS.items()
}
"""Layouts of the variants, to say which of them a file is for."""


@dataclass(frozen=True)
class Released:
    """A file of the official format, read and checked."""

    path: Path
    layout: Layout
    rank: int
    """Zero where only types and head were trained."""
    scales: Mapping[str, float] | None
    """Factor s by layer; None where the file does not say."""
    trained: Mapping[str, Tensor]
    """Types, head and factors under their names, float32."""
    frozen: Mapping[str, Tensor]
    """Backbone and positions, or nothing."""

    def check(self, layout: Layout, name: str) -> None:
        """Refuse a model of another layout.

        Args:
            layout: the model's.
            name: what to call the model.

        Raises:
            AdapterFileError: naming what the file is for.
        """
        if _agree(self.layout, layout):
            return
        fitting = [other for other, item in LAYOUTS.items() if _agree(self.layout, item)]
        what = f"for {' or '.join(fitting)}" if fitting else "for another model"
        raise AdapterFileError(f"{self.path} is {what} ({self.layout}), not for {name} ({layout})")

    @torch.no_grad()
    def copy_frozen(self, model: LoRAT) -> None:
        """Set backbone and positions of a tracker that has no adapter yet."""
        names = keys.frozen_names(self.layout)
        given = {
            ours: torch.cat([self.frozen[item] for item in theirs])
            for ours, theirs in names.items()
        }
        own = {name: value for name, value in model.state_dict().items() if name not in given}
        fill(model, own | given, f"the frozen part of {self.path} does not fit")

    @torch.no_grad()
    def copy_trained(self, model: LoRAT) -> None:
        """Set types, head and, where the file has one, the adapter of a tracker that fits."""
        for theirs in keys.trained_shapes(self.layout.width):
            model.get_parameter(keys.our_name(theirs)).copy_(self.trained[theirs])
        if not self.rank:
            return
        for layer in keys.adapted_layers(self.layout):
            host: Any = model.get_submodule(layer.module)
            delta = host.adapters[ADAPTER][layer.key]
            # where layers differ in s, their B takes what the one s of our adapter leaves over
            factor = 1.0 if self.scales is None else self.scales[layer.theirs] / delta.scale
            delta.A.copy_(self.trained[f"{layer.theirs}.lora.A"])
            delta.B.copy_(self.trained[f"{layer.theirs}.lora.B"] * factor)

    @property
    def alpha(self) -> float | None:
        """The alpha of plain LoRA that has the file's s, where the file says one for all layers."""
        found = set((self.scales or {}).values())
        return found.pop() * self.rank if len(found) == 1 else None


def read_released(path: str | Path) -> Released:
    """Read and check a file of the official format.

    Raises:
        DataError: it cannot be read.
        AdapterFileError: names or shapes that the format does not have, or that are missing.
    """
    path = Path(path)
    tensors = {keys.plain(name): value for name, value in read_tensors(path).items()}
    layout, rank = _layout(path, tensors)
    shapes = keys.trained_shapes(layout.width)
    layers = keys.adapted_layers(layout) if rank else []
    for layer in layers:
        shapes[f"{layer.theirs}.lora.A"] = (rank, layer.in_features)
        shapes[f"{layer.theirs}.lora.B"] = (layer.out_features, rank)
    numbers = {name for name in tensors if _is_number(name)}
    backbone = {item for theirs in keys.frozen_names(layout).values() for item in theirs}
    frozen = {name: tensors[name] for name in tensors.keys() & backbone}
    _refuse(path, "lacks", shapes.keys() - tensors.keys())
    _refuse(path, "has the unexpected", tensors.keys() - shapes.keys() - backbone - numbers)
    _refuse(path, "lacks", (backbone if frozen else set()) - tensors.keys())
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise AdapterFileError(
                f"{path}: {name} is {tuple(tensors[name].shape)}, and the others make it {shape}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise AdapterFileError(f"{path}: {name} holds NaN or infinity")
    scales = _scales(tensors, [layer.theirs for layer in layers], rank) if numbers else None
    trained = {name: tensors[name].float() for name in shapes}
    return Released(path, layout, rank, scales, trained, frozen)


def _agree(one: Layout, other: Layout) -> bool:
    """Whether two layouts are the same as far as both are known."""
    sizes = [(item.width, item.depth, item.into, item.out_of) for item in (one, other)]
    grids = {item.grid for item in (one, other) if item.grid is not None}
    # a file of types and head alone knows no block
    return (sizes[0] == sizes[1] or (not one.depth and one.width == other.width)) and len(grids) < 2


def _layout(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Layout, int]:
    """Return what the shapes say of the model, and the rank, zero without an adapter."""
    types = tensors.get("token_type_embed")
    if types is None or types.dim() != 2:
        backbone = "; as backbone weights, perhaps" if "cls_token" in tensors else ""
        raise AdapterFileError(f"{path} is no LoRAT tracker: it has no token_type_embed{backbone}")
    width = types.shape[1]
    found = [re.match(r"blocks\.(\d+)\..*\.lora\.[AB]$", name) for name in tensors]
    blocks = {item[1] for item in found if item is not None}
    if not blocks:
        return Layout(width, 0, 0, 0), 0
    gated = any(".mlp.w12." in name for name in tensors)
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    needed = [f"blocks.0.mlp.{first}.lora.B", f"blocks.0.mlp.{second}.lora.A"]
    _refuse(path, "lacks", [n for n in needed if n not in tensors or tensors[n].dim() != 2])
    up, down = (tensors[name] for name in needed)
    positions = tensors.get("pos_embed")
    grid = None if positions is None or positions.dim() != 3 else int(positions.shape[1] ** 0.5)
    return Layout(width, len(blocks), up.shape[0], down.shape[1], grid), down.shape[0]


def _scales(tensors: Mapping[str, Tensor], layers: list[str], rank: int) -> dict[str, float]:
    """Return the factor s of every layer: its own numbers, else the model's, else 1."""

    def number(layer: str, own: str, common: str, default: float) -> float:
        found = tensors.get(f"{layer}.lora.{own}", tensors.get(common))
        return default if found is None else float(found)

    return {
        layer: number(layer, "alpha", "lora_alpha", float(rank))
        / (rank**0.5 if number(layer, "use_rslora", "use_rslora", 0.0) else rank)
        for layer in layers
    }


def _is_number(name: str) -> bool:
    return name in ("lora_alpha", "use_rslora") or name.endswith(
        (".lora.alpha", ".lora.use_rslora")
    )


def _refuse(path: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise AdapterFileError(f"{path} {what} {names[0]}{more}, so it is no complete LoRAT file")
