"""Looking at the metadata of a safetensors file without reading its tensors."""

from pathlib import Path

import safetensors


def metadata_of(path: str | Path) -> dict[str, str]:
    """Return the metadata, or nothing where the file is none that can be read."""
    try:
        with safetensors.safe_open(Path(path), "pt") as stream:
            return dict(stream.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return {}


def shapes_of(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors by name, or nothing where the file cannot be read."""
    try:
        with safetensors.safe_open(Path(path), "pt") as stream:
            return {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError):
        return {}
