"""Writing an adapter for other tools, or as plain LoRA, and saying how exact it is."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, AdapterStateError
from visionlora.io import contents
from visionlora.io.adapter_file import write_description
from visionlora.io.atomic import write_atomically
from visionlora.io.parts import AdapterParts, evaluating, parts_of_model
from visionlora.io.peft import write_peft
from visionlora.io.plain import Pair, PlainAdapter, flatten
from visionlora.methods.lora import LoRAConfig

logger = logging.getLogger("visionlora")

Format = Literal["peft", "lora"]
_SHOWN = 8


@dataclass(frozen=True)
class ExportReport(os.PathLike[str]):
    """Where an adapter was written, and how exactly; `str()` gives a readable report."""

    path: Path
    kind: str
    """Method under which it was written: `lora`, or PEFT's name."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank by site, where it was written as plain LoRA."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative Frobenius error of the change by site, 0 where it is exact."""
    error: float = 0.0
    """Relative Frobenius error over all sites."""

    def __fspath__(self) -> str:
        """Return the path, so that a report stands for what was written."""
        return os.fspath(self.path)

    def __str__(self) -> str:
        lines = [f"{self.path}: written as {self.kind}"]
        if self.errors:
            ranks = sorted(set(self.ranks.values()))
            shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            exact = "exact" if not self.error else f"relative error {self.error:.2e}"
            lines[0] += f" of rank {shown} at {len(self.ranks)} sites, {exact}"
        worst = sorted((item for item in self.errors.items() if item[1]), key=lambda item: -item[1])
        lines += [f"  {name}: relative error {error:.2e}" for name, error in worst[:_SHOWN]]
        if len(worst) > _SHOWN:
            lines.append(f"  and {len(worst) - _SHOWN} sites with smaller errors")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format = "peft",
    name: str | None = None,
    rank: int | None = None,
) -> ExportReport:
    """Write one adapter for PEFT, or as a native file of plain LoRA.

    Args:
        model: a model with the adapter.
        path: folder of the two PEFT files, or the native file.
        format: `peft`: PEFT's own form of the method where it has one, else plain LoRA. `lora`:
            plain LoRA in a native file, which `load` reads into the same model, with grouped
            convolutions and single projections of attention layers as they are.
        name: which adapter; may be omitted if there is one.
        rank: write plain LoRA of at most this rank per site: the best approximation of the change
            where it has a higher one. None writes every change exactly.

    Returns:
        What was written, with the relative error of every site.

    Raises:
        AdapterStateError: there is no such adapter, it routes by input, or the format has no place
            for a part of it.
        OutputError: the path cannot be written.
    """
    if format not in get_args(Format):
        raise AdapterFileError(
            f"unknown export format {format!r}; allowed: "
            f"{', '.join(repr(item) for item in get_args(Format))}"
        )
    parts = parts_of_model(model, name)
    with evaluating(parts):
        report = write_parts(parts, path, format, rank)
    (logger.warning if report.error else logger.info)("%s", report)
    return report


def write_parts(
    parts: AdapterParts, path: str | Path, format: Format, rank: int | None
) -> ExportReport:
    """Write the parts of an adapter (see `export`)."""
    if format == "peft":
        kind, plain = write_peft(parts, path, rank)
        return _report(Path(path), kind, plain)
    plain = flatten(parts, rank)
    write_plain(plain, parts.figures, path)
    return _report(Path(path), "lora", plain)


def write_plain(plain: PlainAdapter, figures: dict[str, list[float]], path: str | Path) -> Path:
    """Write factor pairs as a native file of the method `lora`.

    Raises:
        AdapterStateError: there is no pair.
    """
    if not plain.pairs:
        raise AdapterStateError(
            "the adapter changes no weight matrix, so it is no LoRA; `save` keeps it as it is"
        )
    plan = [(pair.site, _config(pair)) for pair in plain.pairs]
    tensors: dict[str, Tensor] = {}
    for pair in plain.pairs:
        tensors[f"adapter.{pair.site.name}.A"] = pair.down
        tensors[f"adapter.{pair.site.name}.B"] = pair.up
    tensors |= {f"base.{name}": item for name, item in plain.heads.items()}
    known = {name: figures[name] for site, _ in plan if (name := site.name) in figures}
    return write_native(tensors, write_description(plan, {}, known), path)


def write_native(tensors: dict[str, Tensor], description: str, path: str | Path) -> Path:
    """Write tensors and description of a native file."""
    contents.refuse_non_finite(tensors, "cannot write")
    data = safetensors.torch.save(
        {key: item.detach().contiguous().cpu().clone() for key, item in tensors.items()},
        {"visionlora": description},
    )
    return write_atomically(path, lambda temporary: _write_bytes(temporary, data))


def _config(pair: Pair) -> LoRAConfig:
    return LoRAConfig(rank=pair.rank, alpha=pair.scale * pair.rank)


def _report(path: Path, kind: str, plain: PlainAdapter | None) -> ExportReport:
    pairs = [] if plain is None else plain.pairs
    return ExportReport(
        path,
        kind,
        {pair.site.name: pair.rank for pair in pairs},
        {pair.site.name: pair.error for pair in pairs},
        0.0 if plain is None else plain.error,
    )


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
