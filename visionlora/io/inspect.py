"""Looking into an adapter file without a model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from visionlora.io.adapter_file import read_adapter
from visionlora.io.foreign import ForeignInfo, inspect_foreign, ours
from visionlora.io.opening import is_foreign
from visionlora.io.peft.inspect import PeftInfo, inspect_peft
from visionlora.io.safetensors_file import metadata_of, shapes_of

_SHOWN = 6


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file holds; `str()` gives a readable report."""

    path: Path
    methods: tuple[str, ...]
    options: tuple[dict[str, object], ...]
    """Method and options of every configuration."""
    sites: dict[str, tuple[int, int]]
    """`{site name: (out, in)}`."""
    parameters: int
    """Stored scalars of the adapter."""
    base: tuple[str, ...]
    """Trained heads and changed buffers of the base model."""
    file_bytes: int

    def __str__(self) -> str:
        shapes = Counter(self.sites.values())
        views = ", ".join(
            f"{count} of {out} x {width}" for (out, width), count in shapes.most_common(_SHOWN)
        )
        views += ", ..." if len(shapes) > _SHOWN else ""
        lines = [f"{self.path}: {self.file_bytes:,} bytes, {self.parameters:,} adapter scalars"]
        lines += [
            " ".join(f"{key}={value}" for key, value in option.items()) for option in self.options
        ]
        lines.append(f"{len(self.sites)} sites: {views}")
        lines.append(f"from {next(iter(self.sites))} to {list(self.sites)[-1]}")
        if self.base:
            more = f" and {len(self.base) - _SHOWN} more" if len(self.base) > _SHOWN else ""
            lines.append(f"trained with it: {', '.join(self.base[:_SHOWN])}{more}")
        return "\n".join(lines)


def inspect(path: str | Path) -> AdapterInfo | PeftInfo | ForeignInfo:
    """Describe an adapter file, a PEFT adapter, or whatever else a safetensors file may be.

    Raises:
        AdapterFileError: the file is missing, truncated or damaged.
    """
    if is_foreign(path):
        return inspect_peft(path)
    metadata = metadata_of(path) if Path(path).is_file() else {}
    if ours(metadata) or ("visionlora" not in metadata and shapes_of(path)):
        return inspect_foreign(path)
    return _inspect_native(path)


def _inspect_native(path: str | Path) -> AdapterInfo:
    file = read_adapter(path)
    configs = dict.fromkeys(config for _, config in file.plan)
    prefix = "base."
    return AdapterInfo(
        path=file.path,
        methods=tuple(dict.fromkeys(config.method for config in configs)),
        options=tuple(config.to_dict() for config in configs),
        sites={site.name: (site.out_features, site.in_features) for site, _ in file.plan},
        parameters=sum(
            item.numel()
            for key, item in file.tensors.items()
            if key.startswith(("adapter.", "shared."))
        ),
        base=tuple(key.removeprefix(prefix) for key in file.tensors if key.startswith(prefix)),
        file_bytes=file.path.stat().st_size,
    )
