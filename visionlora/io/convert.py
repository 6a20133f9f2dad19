"""Turning an adapter file into another format, without the model it was trained in."""

from pathlib import Path
from typing import Literal, get_args

from visionlora.errors import AdapterFileError
from visionlora.io import contents
from visionlora.io.adapter_file import write_description
from visionlora.io.export import ExportReport, write_native, write_parts
from visionlora.io.known import KnownLayers, NoLayers, read_base
from visionlora.io.opening import open_adapter
from visionlora.io.parts import evaluating, parts_of_file

Target = Literal["peft", "visionlora", "lora"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target = "peft",
    base: str | Path | None = None,
    rank: int | None = None,
) -> ExportReport:
    """Read an adapter of either format and write it in another one.

    Args:
        source: a native file, or a PEFT folder or file.
        target: the folder of a PEFT adapter, or the native file.
        to: `peft`: PEFT's format, in its own form of the method where it has one. `visionlora`: a
            native file of the same method. `lora`: a native file of plain LoRA.
        base: state dict of the base model as a safetensors file, for methods whose change depends
            on the base weights (DoRA and HiRA as plain LoRA, LoLDU, OFT), and for what a file does
            not say, such as kernel sizes.
        rank: highest rank of plain LoRA (see `export`).

    The padding row of an embedding, which no adapter changes here, is not in a file: convert an
    adapter of such a layer with `export`, from its model.

    Returns:
        What was written, with the relative error of every site.

    Raises:
        AdapterFileError: the source cannot be read, or base weights are needed.
        OutputError: the target cannot be written.
    """
    if to not in get_args(Target):
        raise AdapterFileError(
            f"unknown format {to!r}; allowed: {', '.join(repr(item) for item in get_args(Target))}"
        )
    known: KnownLayers = NoLayers() if base is None else read_base(base)
    file = open_adapter(source, known)
    if to == "visionlora":
        figures = dict(file.base)
        for site, _ in file.plan:
            weight = known.weight(site)
            if weight is not None:
                figures[site.name] = contents.figures_of(weight)
        description = write_description(file.plan, file.frozen, figures)
        methods = dict.fromkeys(config.method for _, config in file.plan)
        return ExportReport(write_native(file.tensors, description, target), ", ".join(methods))
    parts = parts_of_file(file, known)
    with evaluating(parts):
        return write_parts(parts, target, to, rank)
