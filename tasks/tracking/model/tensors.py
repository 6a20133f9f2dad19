"""Files of named tensors, told apart by their content, and modules that take all or none."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from visionlora.errors import DataError


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of a file: safetensors by its content, else a pickle of tensors.

    Raises:
        DataError: it is missing, damaged, or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"no weights file at {path}")
    try:
        with path.open("rb") as stream:  # by handle, because torch.load believes suffixes
            if stream.read(9)[8:] == b"{":  # eight bytes give the length of the JSON header
                return safetensors.torch.load_file(path)
            stream.seek(0)
            found = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise anything
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        # What torch says of a foreign file is how to run whatever it contains.
        reason = "it is no file of tensors" if "weights_only" in said else said
        raise DataError(f"{path} cannot be read as tensors: {reason}") from error
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise DataError(f"{path} holds no dictionary of tensors")
    return found


def fill(module: nn.Module, tensors: dict[str, Tensor], wrong: str) -> None:
    """Copy tensors into a module; all names and shapes must fit.

    Raises:
        DataError: `wrong`, and the first thing that does not fit.
    """
    wanted = module.state_dict()
    for what, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("has also", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise DataError(f"{wrong}: it {what} {min(names)} ({len(names)} tensors in all)")
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise DataError(
                f"{wrong}: {name} is {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
            )
    module.load_state_dict(tensors)
