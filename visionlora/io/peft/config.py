"""Reading the two files of a PEFT adapter, and the rules by which its configuration names layers.

Only safetensors are read: a `.bin` is a pickle, which can run code while it is loaded.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io import contents

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""In front of every layer name in a PEFT file."""


@dataclass(frozen=True)
class PeftFile:
    """The parsed but not yet interpreted files of a PEFT adapter."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """PEFT's name of the method, such as `LORA`."""
        return str(self.config["peft_type"]).rpartition(".")[2].upper()


def is_peft(path: str | Path) -> bool:
    """Whether a folder, or the folder of a file, holds a PEFT configuration."""
    path = Path(path)
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.name == CONFIG or (path.suffix != "" and (path.parent / CONFIG).is_file())


def read_peft(path: str | Path) -> PeftFile:
    """Read a PEFT folder, or either of its two files.

    Raises:
        AdapterFileError: a file is missing, damaged, or a pickle.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path if path.suffix == ".safetensors" else folder / TENSORS
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise _pickle(path)
    if not file.is_file():
        pickled = next(iter(sorted(folder.glob("adapter_model*.bin"))), None)
        if pickled is not None:
            raise _pickle(pickled)
        raise AdapterFileError(f"{folder} has no {TENSORS} beside its {CONFIG}")
    config = _read_config(folder / CONFIG)
    try:
        with safetensors.safe_open(file, "pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{file} is truncated or not a safetensors file ({error})"
        ) from error
    contents.refuse_non_finite(
        {key: item for key, item in tensors.items() if "logits" not in key}, str(file)
    )
    return PeftFile(folder, config, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{path} names no peft_type, so it describes no PEFT adapter")
    return config


def _pickle(path: Path) -> AdapterFileError:
    return AdapterFileError(
        f"{path} is a pickle, which can run code while it is read; save it again with PEFT's "
        "save_pretrained(safe_serialization=True)"
    )


def by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """Return the value of the first pattern that a layer name, or a dotted end of it, matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def exact_pattern(name: str) -> str:
    """Return a pattern that no other layer matches, unlike the bare name."""
    return "^" + re.escape(name)


def exact_targets(names: Iterable[str]) -> str:
    """Return `target_modules` that match these layers and no other."""
    return "|".join(re.escape(name) for name in names)


def targeted(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the layers that a configuration names, in the given order.

    Raises:
        AdapterFileError: it names none.
    """
    targets = config.get("target_modules")
    found = [
        name
        for name in names
        if not _matches(config.get("exclude_modules"), name)
        and not _inside(config.get("modules_to_save"), name)
        and (targets == "all-linear" or _chosen(config, targets, name))
    ]
    if not found:
        raise AdapterFileError(f"target_modules {targets!r} match no layer of the model")
    return found


def _matches(targets: Any, name: str) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _chosen(config: dict[str, Any], targets: Any, name: str) -> bool:
    """Whether a name is a target: a pattern or a full name always, an ending in some blocks."""
    if isinstance(targets, str) or name in (targets or ()):
        return _matches(targets, name)
    return _matches(targets, name) and _in_layer(config, name)


def _inside(modules: Any, name: str) -> bool:
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules or ())


def _in_layer(config: dict[str, Any], name: str) -> bool:
    """Whether the number of the block in a name is among `layers_to_transform`."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns]
    found = found or [re.match(r".*?\.[^.]*\.(\d+)\.", name)]
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in wanted
