"""The description in a native adapter file, and reading such a file without a model."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from visionlora.config import AdapterConfig, check_fields
from visionlora.errors import AdapterFileError
from visionlora.io import contents
from visionlora.io.foreign import guess
from visionlora.registry import build_config
from visionlora.sites import Site

FORMAT = "visionlora-adapter"
VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """A parsed and validated adapter file."""

    path: Path
    plan: list[tuple[Site, AdapterConfig]]
    tensors: dict[str, Tensor]
    frozen: dict[str, list[float]]
    """Fingerprints of seeded tensors."""
    base: dict[str, list[float]]
    """Figures of the adapted weights."""


def read_adapter(path: str | Path) -> AdapterFile:
    """Read and validate an adapter file without a model.

    Raises:
        AdapterFileError: it is missing, truncated, not of this format, or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"no adapter file at {path}")
    try:
        with safetensors.safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} is truncated or not a safetensors file ({error})"
        ) from error
    if "visionlora" not in metadata:
        raise AdapterFileError(
            f"{path} has no visionlora description: another tool wrote it, and it looks like "
            f"{guess({key: tuple(item.shape) for key, item in tensors.items()})}"
        )
    return parse_adapter(path, metadata["visionlora"], tensors)


def parse_adapter(path: Path, description: str, tensors: dict[str, Tensor]) -> AdapterFile:
    """Validate the description and the tensors of an adapter.

    Raises:
        AdapterFileError: naming `path`, when they are not of this format or inconsistent.
    """
    try:
        header = json.loads(description)
        if header["format"] != FORMAT or header["version"] > VERSION:
            raise AdapterFileError(
                f"{path} has format {header['format']} version {header['version']}; this version "
                f"of visionlora reads {FORMAT} up to version {VERSION}"
            )
        configs = [_read_config(item) for item in header["configs"]]
        plan = [(read_site(item), configs[index]) for item, index in header["sites"]]
        frozen = {key: _numbers(item) for key, item in header["frozen"].items()}
        there = dict(header["base"])  # empty where a file was converted without its base model
        base = {site.name: _numbers(there[site.name], 4) for site, _ in plan if there}
        file = AdapterFile(path, plan, tensors, frozen, base)
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AdapterFileError(f"{path} has a damaged description ({error})") from error
    if not plan:
        raise AdapterFileError(f"{path} describes no site")
    contents.refuse_non_finite(tensors, str(path))
    return file


def write_description(
    plan: Sequence[tuple[Site, AdapterConfig]],
    frozen: Mapping[str, list[float]],
    base: Mapping[str, list[float]],
) -> str:
    """Return the description that `parse_adapter` reads."""
    configs = list(dict.fromkeys(config for _, config in plan))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "configs": [config.to_dict() for config in configs],
        "sites": [[dataclasses.asdict(site), configs.index(config)] for site, config in plan],
        "frozen": frozen,
        "base": base,
    }
    return json.dumps(header)


def _read_config(item: dict[str, Any]) -> AdapterConfig:
    return build_config(
        item["method"], {key: value for key, value in item.items() if key != "method"}
    )


def read_site(item: dict[str, Any]) -> Site:
    """Return the site of a description, with its fields checked."""
    rows = item["rows"]
    site = Site(**{**item, "rows": None if rows is None else (int(rows[0]), int(rows[1]))})
    check_fields(site)
    return site


def _numbers(values: Any, count: int | None = None) -> list[float]:
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, got {len(values)}")
    return [float(value) for value in values]
