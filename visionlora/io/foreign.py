"""What a safetensors file of another tool seems to be, told by the names of its tensors."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from visionlora.errors import AdapterFileError
from visionlora.io.safetensors_file import metadata_of, shapes_of

_SIGNS = (
    (r"lora_(unet|te\d?|transformer)_.*\.(lora_down|lora_up|alpha)", "a Kohya LoRA"),
    (r"lycoris_.*|.*\.(hada_w|lokr_w|oft_blocks)", "a LyCORIS adapter"),
    (r"(unet|text_encoder|transformer)\..*lora_[AB]\.weight", "a diffusers LoRA"),
    (r"(base_model\.)?.*lora_(embedding_)?[AB](\.weight)?", "a PEFT LoRA without its config"),
    (r"base_model\.", "a PEFT adapter without its adapter_config.json"),
    (r"adapter\.|shared\.", "a native adapter that has lost its description"),
    (r".*(weight|bias|running_mean|pos_embed|cls_token)$", "the weights of a whole model"),
)
_OURS = {
    "visionlora-integers": "an integer adapter of ours (load_integers)",
    "visionlora-generator": "a generator of adapters of ours (visionlora.generate)",
}
_SHOWN = 6


@dataclass(frozen=True)
class ForeignInfo:
    """What an unknown safetensors file holds; `str()` gives a readable report."""

    path: Path
    looks_like: str
    """A guess by the names of the tensors."""
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    file_bytes: int

    def __str__(self) -> str:
        scalars = sum(map(prod, self.shapes.values()))
        lines = [
            f"{self.path}: {self.file_bytes:,} bytes, {len(self.shapes)} tensors, "
            f"{scalars:,} scalars",
            f"looks like {self.looks_like}",
        ]
        lines += [f"  {name}: {shape}" for name, shape in list(self.shapes.items())[:_SHOWN]]
        if len(self.shapes) > _SHOWN:
            lines.append(f"  and {len(self.shapes) - _SHOWN} more")
        lines += [f"metadata: {key}={value[:80]}" for key, value in list(self.metadata.items())[:4]]
        return "\n".join(lines)


def inspect_foreign(path: str | Path) -> ForeignInfo:
    """Describe a safetensors file that is no adapter of a known format.

    Raises:
        AdapterFileError: it holds no tensor that can be read.
    """
    path, shapes = Path(path), shapes_of(path)
    if not shapes:
        raise AdapterFileError(f"{path} is truncated, empty or not a safetensors file")
    metadata = metadata_of(path)
    kind = ours(metadata) or guess(shapes)
    return ForeignInfo(path, kind, shapes, metadata, path.stat().st_size)


def ours(metadata: dict[str, str]) -> str:
    """Return what other file of ours a description names, or an empty string."""
    try:
        named = json.loads(metadata.get("visionlora", "null"))
    except ValueError:
        named = None
    form = named.get("format") if isinstance(named, dict) else None
    return next((kind for key, kind in _OURS.items() if key in (form, *metadata)), "")


def guess(names: dict[str, tuple[int, ...]]) -> str:
    """Return what most of the tensor names speak for; a rare kind of name wins over `.weight`."""
    found = Counter(
        next((kind for pattern, kind in _SIGNS if re.match(pattern, name)), "") for name in names
    )
    for _, kind in _SIGNS:
        if found[kind] * 4 >= max(len(names), 1):
            return kind
    return "nothing known here"
