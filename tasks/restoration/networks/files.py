"""Base networks on disk: this project's files, published ones, and the one that ships.

tiny          the small NAFNet that comes with the project
NAME:random   a network of the catalogue with fresh weights, to train from scratch
FILE          this project's safetensors, which say what they hold; or a checkpoint of the official
              NAFNet or Restormer code, whose sizes are read off its tensors; or, with `spandrel`
              installed, a published file of some forty other restoration networks

A base is known by its digest, the SHA-256 of all tensors in the order of their names: an adapter
belongs to the weights it was trained on, and is refused on others.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tasks.restoration.networks.catalogue import Spec, find_network
from tasks.restoration.networks.published import guess
from visionlora.errors import ConfigError, DataError
from visionlora.io.atomic import write_atomically

TINY = "tiny"
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
RANDOM = ":random"
KEY = "visionlora_base"
"""Entry of a safetensors file's metadata that makes it one of ours."""
WRAPPERS = ("params_ema", "params", "state_dict")
"""Entries under which published checkpoints keep their tensors."""


@dataclass(frozen=True)
class Base:
    """A base network and where it is from."""

    model: nn.Module
    spec: Spec | None
    """None for a network that is known to `spandrel` alone."""
    name: str
    digest: str
    facts: Mapping[str, Any]
    """What its file says about its training."""


def load_base(base: str | Path, seed: int = 0) -> Base:
    """Return a base network.

    Args:
        base: see above.
        seed: of fresh weights.

    Raises:
        ConfigError: neither a known name nor a file.
        DataError: a file that cannot be read, or holds another network.
    """
    text = str(base)
    if text.endswith(RANDOM):
        spec = find_network(text.removesuffix(RANDOM))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = spec.build()
        return Base(model, spec, text, digest(model.state_dict()), {})
    path = TINY_WEIGHTS if text == TINY else Path(text).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no base network {text!r}: give {TINY}, a file, or the name of a network with "
            f"{RANDOM}, as in nafnet-32{RANDOM}"
        )
    name = TINY if text == TINY else path.name
    described = _described(path)
    if described is not None:
        spec, facts, tensors = described
        return _filled(spec, tensors, path, name, facts)
    tensors = read_checkpoint(path)
    found = guess(tensors)
    if found is not None:
        return _filled(found, tensors, path, name, {})
    return _from_spandrel(path, name)


def save_base(model: nn.Module, spec: Spec, path: str | Path, **facts: Any) -> Path:
    """Write a base network with what it is and how it was made.

    Raises:
        DataError: a weight is not finite.
        OutputError: the file cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in _sorted(model)}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise DataError(f"cannot save a base network: {name} holds values that are not finite")
    text = json.dumps({**asdict(spec), "facts": facts})
    data = safetensors.torch.save(tensors, metadata={KEY: text})
    return write_atomically(path, lambda temporary: _write(temporary, data))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in the order of their names."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        made.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        made.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, out of whatever they are wrapped in; nothing is unpickled.

    Raises:
        DataError: the file cannot be read, or holds no tensors.
    """
    try:
        if _is_safetensors(path):
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, some with a page of text
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a file of weights: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = content if isinstance(content, dict) else {}
    found = {str(k).removeprefix("module."): v for k, v in tensors.items() if torch.is_tensor(v)}
    if not found:
        raise DataError(f"{path} holds no weights")
    return found


def _described(path: Path) -> tuple[Spec, dict[str, Any], dict[str, Tensor]] | None:
    """Return what one of this project's files holds, None if it is none."""
    if not _is_safetensors(path):
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                return None
            said = json.loads(text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Spec(said["family"], said["arguments"]), said.get("facts", {}), tensors
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _filled(
    spec: Spec, tensors: dict[str, Tensor], path: Path, name: str, facts: Mapping[str, Any]
) -> Base:
    model = spec.build()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise DataError(f"{path} does not fit the {spec.family} it says it is: {reason}") from error
    return Base(model, spec, name, digest(model.state_dict()), facts)


def _from_spandrel(path: Path, name: str) -> Base:
    try:
        from spandrel import ModelLoader
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} is neither NAFNet nor Restormer; for other networks: pip install spandrel"
        ) from error
    try:
        model = ModelLoader().load_from_file(path).model
    except Exception as error:
        raise DataError(f"{path} is no restoration network that spandrel knows") from error
    return Base(model, None, name, digest(model.state_dict()), {})


def _is_safetensors(path: Path) -> bool:
    """Tell by the content: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _sorted(model: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted(model.state_dict().items())


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
