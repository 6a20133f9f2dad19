"""Looking into a PEFT adapter without a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.errors import AdapterFileError
from visionlora.io.known import NoLayers
from visionlora.io.peft.config import TENSORS, read_peft
from visionlora.io.peft.mapping import find_mapping
from visionlora.io.peft.read import sort_tensors

_SHOWN = 6
_LONGEST = 60
_UNTOLD = (
    "peft_type",
    "base_model_name_or_path",
    "target_modules",
    "modules_to_save",
    "auto_mapping",
)


@dataclass(frozen=True)
class PeftInfo:
    """What a PEFT adapter holds; `str()` gives a readable report."""

    path: Path
    kind: str
    """PEFT's name of the method."""
    methods: tuple[str, ...]
    """Our methods that the adapter becomes when it is loaded."""
    options: dict[str, Any]
    """Entries of the configuration that are set."""
    layers: tuple[str, ...]
    """Layers that have tensors of their own."""
    parameters: int
    """Stored scalars of the adapter, frozen ones included."""
    base: tuple[str, ...]
    """Trained heads and biases of the base model."""
    base_model: str | None
    """Name of the base model, if the configuration has one."""
    file_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.path}: PEFT {self.kind}, {self.file_bytes:,} bytes, "
            f"{self.parameters:,} adapter scalars",
            f"read here as {' or '.join(self.methods)}" if self.methods else "cannot be read here",
            " ".join(f"{key}={_short(value)}" for key, value in self.options.items()),
        ]
        if self.layers:
            lines.append(f"{len(self.layers)} layers: {_some(self.layers)}")
        if self.base:
            lines.append(f"trained with it: {_some(self.base)}")
        if self.base_model:
            lines.append(f"base model: {self.base_model}")
        return "\n".join(line for line in lines if line)


def inspect_peft(path: str | Path) -> PeftInfo:
    """Describe a PEFT adapter.

    Raises:
        AdapterFileError: a file of it is missing, damaged or a pickle.
    """
    file = read_peft(path)
    try:
        mapping = find_mapping(file.kind)
        source, heads = sort_tensors(file, mapping, NoLayers())
        layers, methods = tuple(source.layers), mapping.reads_as
        held = [tensor for tensors in source.layers.values() for tensor in tensors.values()]
        held += source.shared.values()
        base = tuple(key.removeprefix("base.") for key in heads)
    except AdapterFileError:
        layers, methods, held, base = (), (), list(file.tensors.values()), ()
    return PeftInfo(
        file.path,
        file.kind,
        methods,
        {
            k: v
            for k, v in file.config.items()
            if k not in _UNTOLD and v not in (None, {}, [], False)
        },
        tuple(sorted(layers)),
        sum(tensor.numel() for tensor in held),
        base,
        file.config.get("base_model_name_or_path") or None,
        (file.path / TENSORS).stat().st_size,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
