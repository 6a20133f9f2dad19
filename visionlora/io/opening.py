"""Opening an adapter of either format: which one it is shows in its content."""

from pathlib import Path

from visionlora.io.adapter_file import AdapterFile, read_adapter
from visionlora.io.known import KnownLayers
from visionlora.io.peft import is_peft, read_as_native
from visionlora.io.safetensors_file import metadata_of


def open_adapter(path: str | Path, known: KnownLayers) -> AdapterFile:
    """Read a native file, or a PEFT folder or file, in our terms.

    Raises:
        AdapterFileError: it is missing, damaged, of another format, or for another model.
    """
    return read_as_native(path, known) if is_foreign(path) else read_adapter(path)


def is_foreign(path: str | Path) -> bool:
    """Whether an adapter is one of PEFT's: it lies beside PEFT's configuration and is not ours."""
    path = Path(path)
    return is_peft(path) and not (path.is_file() and "visionlora" in metadata_of(path))
