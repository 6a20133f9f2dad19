"""What is known of the base model while a file is read or rewritten.

A model knows everything. A state dict knows shapes and values, but neither the order of the layers
nor what a layer is beyond its shapes. Without either, a file has to speak for itself.
"""

from pathlib import Path
from typing import Protocol

import safetensors
from torch import Tensor, nn

from visionlora.errors import AdapterFileError
from visionlora.hosts import Host, describe
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.methods.base import Delta, Shared
from visionlora.record import SharedStates
from visionlora.sites import Kind, Site
from visionlora.targets import ATTENTION_SLICES


class KnownLayers(Protocol):
    """Layers and weights of a base model, as far as they are known."""

    def layers(self) -> dict[str, Kind] | None:
        """Return the linear layers and embeddings in model order, if they are known."""

    def site(self, module: str, key: str, kind: Kind) -> Site | None:
        """Return the site of a layer that is expected to be of `kind`."""

    def tensor(self, name: str) -> Tensor | None:
        """Return a parameter or buffer of the base model."""

    def weight(self, site: Site) -> Tensor | None:
        """Return the frozen weight of a site as its `(out, in)` view."""

    def complete(self, module: str) -> dict[str, Tensor]:
        """Return all tensors of a layer, by name relative to it."""

    def ending(self, text: str) -> list[str]:
        """Return the modules whose names end with a text."""


class NoLayers:
    """Nothing is known."""

    def layers(self) -> dict[str, Kind] | None:
        """Return None: unknown."""
        return None

    def site(self, module: str, key: str, kind: Kind) -> Site | None:
        """Return None: unknown."""
        return None

    def tensor(self, name: str) -> Tensor | None:
        """Return None: unknown."""
        return None

    def weight(self, site: Site) -> Tensor | None:
        """Return None: unknown."""
        return None

    def complete(self, module: str) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def ending(self, text: str) -> list[str]:
        """Return nothing."""
        return []


class BaseFile:
    """The state dict of a base model; attention layers are known by their `in_proj_weight`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def layers(self) -> dict[str, Kind] | None:
        """Return None: safetensors files keep no order, and do not tell embeddings."""
        return None

    def site(self, module: str, key: str, kind: Kind) -> Site | None:
        """Return the site, of `kind` unless the weight is that of a convolution."""
        weight = self.tensors.get(f"{module}.{_stored_name(self, module, key)}")
        if weight is None:
            return None
        bias = f"{module}.bias" in self.tensors or f"{module}.in_proj_bias" in self.tensors
        if weight.dim() == 1:
            return Site(module, key, "norm", weight.numel(), 1, bias=bias)
        if key in ("q", "k", "v") and f"{module}.in_proj_weight" in self.tensors:
            width = weight.shape[0] // 3
            start = "qkv".index(key) * width
            rows = (start, start + width)
            return Site(module, key, "linear", width, weight.shape[1], rows, bias=bias)
        if kind == "embedding":
            return Site(module, key, kind, weight.shape[1], weight.shape[0])
        kind = "conv" if weight.dim() == 4 else "linear"
        return Site(
            module,
            key,
            kind,
            weight.shape[0],
            weight[0].numel(),
            bias=bias,
            kernel=weight[0, 0].numel(),
        )

    def tensor(self, name: str) -> Tensor | None:
        """Return an entry of the state dict."""
        return self.tensors.get(name)

    def weight(self, site: Site) -> Tensor | None:
        """Return the view of an entry."""
        weight = self.tensors.get(f"{site.module}.{_stored_name(self, site.module, site.key)}")
        return None if weight is None else _checked_view(weight, site)

    def complete(self, module: str) -> dict[str, Tensor]:
        """Return the entries below a module, its own and those of its children."""
        prefix = f"{module}."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def ending(self, text: str) -> list[str]:
        """Return the owners of tensors."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        return [name for name in owners if name.endswith(text)]


class ModelLayers:
    """A model, adapted or not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if not isinstance(module, Delta | Shared | SharedStates) and ".adapters" not in name
        }

    def layers(self) -> dict[str, Kind] | None:
        """Return the linear layers and the embeddings."""
        return {
            name: "embedding" if isinstance(module, nn.Embedding) else "linear"
            for name, module in self.modules.items()
            if isinstance(module, nn.Linear | nn.Embedding)
        }

    def site(self, module: str, key: str, kind: Kind) -> Site | None:
        """Return the site as `inject` would describe it, or None if there is no such layer."""
        layer = self.modules.get(module)
        if isinstance(layer, nn.MultiheadAttention) is not (key in ATTENTION_SLICES):
            return None
        return None if layer is None else describe(module, layer, key)

    def tensor(self, name: str) -> Tensor | None:
        """Return a parameter or buffer, as it was before a merge."""
        for path, module in self.modules.items():
            if isinstance(module, Host) and name.startswith(f"{path}."):
                kept = (module.state.originals or {}).get(name.removeprefix(f"{path}."))
                if kept is not None:
                    return kept
        path, _, leaf = name.rpartition(".")
        owner = self.modules.get(path)
        if owner is None:
            return None
        found = owner._parameters.get(leaf, owner._buffers.get(leaf))
        return None if found is None else found.detach()

    def weight(self, site: Site) -> Tensor | None:
        """Return the view of a parameter, as it was before a merge."""
        module = self.modules.get(site.module)
        if module is None:
            return None
        name = parameter_name(module, site.key)
        kept = (module.state.originals or {}) if isinstance(module, Host) else {}
        return view_of(kept.get(name, stored(module, name)).detach(), site)

    def complete(self, module: str) -> dict[str, Tensor]:
        """Return the state dict of a module, adapters left out, as it was before a merge."""
        found = self.modules.get(module)
        names = [] if found is None else list(found.state_dict())
        own = {name: self.tensor(f"{module}.{name}") for name in names}
        return {name: item for name, item in own.items() if item is not None}

    def ending(self, text: str) -> list[str]:
        """Return the modules, adapters left out."""
        return [name for name in self.modules if name.endswith(text)]


def read_base(path: str | Path) -> BaseFile:
    """Read the state dict of a base model from a safetensors file.

    Raises:
        AdapterFileError: it is missing or no safetensors file.
    """
    try:
        with safetensors.safe_open(Path(path), "pt") as stream:
            return BaseFile({key: stream.get_tensor(key) for key in stream.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"cannot read base weights from {path}: not a safetensors file ({error})"
        ) from error


def _stored_name(file: BaseFile, module: str, key: str) -> str:
    if key == "out":
        return "out_proj.weight"
    if key in ("q", "k", "v"):
        joint = f"{module}.in_proj_weight" in file.tensors
        if joint:
            return "in_proj_weight"
        return f"{key}_proj_weight" if f"{module}.{key}_proj_weight" in file.tensors else "weight"
    return "weight"


def _checked_view(weight: Tensor, site: Site) -> Tensor:
    if site.rows is not None and site.rows[1] > weight.shape[0]:
        raise AdapterFileError(f"{site.name} has too few rows in the base weights")
    view = weight.reshape(-1, 1) if weight.dim() == 1 else view_of(weight, site)
    if view.shape != (site.out_features, site.in_features):
        raise AdapterFileError(
            f"{site.name} is {site.out_features} x {site.in_features} in the adapter and "
            f"{view.shape[0]} x {view.shape[1]} in the base weights"
        )
    return view
