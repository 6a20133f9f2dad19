"""The command `merge`: a base network and an adapter become one base file that costs nothing extra.

The file loads wherever the base does, the stock network included: names and shapes are the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

import visionlora as vl
from tasks.restoration.networks.files import load_base, save_base
from tasks.restoration.training.adapter_folder import load_adapter
from visionlora.errors import OutputError
from visionlora.io.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Fold an adapter into its base network."""

    base: str = "tiny"
    """tiny or the base file that the adapter was trained on."""
    adapter: str
    """Folder that `adapt` wrote."""
    output: str
    """The file that is written, as in merged.safetensors."""
    overwrite: bool = False
    """Replace the file if it is there."""


def run(config: MergeConfig) -> Path:
    """Write the folded network and return its file.

    Raises:
        VisionLoraError: the base or the adapter cannot be used, or the file is there already.
    """
    path = Path(config.output).expanduser()
    if path.exists() and not config.overwrite:
        raise OutputError(f"{path} is there already: choose another --output, or --overwrite")
    base = load_base(config.base)
    card = load_adapter(base, config.adapter)
    vl.eject(base.model, merge=True)
    facts = {"merged": {"task": card.task, "method": card.method, "base": card.base}}
    if base.spec is not None:
        save_base(base.model, base.spec, path, **facts)
    else:  # a network that another package builds: plain tensors, which it recognises again
        tensors = {name: value.contiguous() for name, value in base.model.state_dict().items()}
        data = safetensors.torch.save(tensors, {"visionlora": json.dumps(facts)})
        write_atomically(path, lambda temporary: _write(temporary, data))
    print(f"{card.task} ({card.method}) is folded into {path}")
    return path


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
