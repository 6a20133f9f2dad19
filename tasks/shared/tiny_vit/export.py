"""The file that ships: batch norms multiplied in, half precision, its making in the metadata."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from tasks.shared.tiny_vit.distil import trained
from tasks.shared.tiny_vit.weights import FILE
from visionlora.io.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which run to export, and where to."""

    run: Path
    """Folder of a run of `distil`, finished or not."""
    output: Path = FILE
    """The file to write."""


def export(config: ExportConfig) -> Path:
    """Write the backbone of a run as one file of half-precision weights.

    Raises:
        DataError: the folder holds no checkpoint.
        OutputError: the file cannot be written.
    """
    student, steps = trained(config.run)
    state = {
        key: value.half().contiguous() for key, value in student.vit.fold().state_dict().items()
    }
    notes = {"format": "pt", "model": "tiny-vit", "steps": str(steps)}
    return write_atomically(config.output, lambda path: save_file(state, path, metadata=notes))
