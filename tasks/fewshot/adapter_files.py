"""What a trained adapter needs besides its tensors, so that `predict` asks for nothing else."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import visionlora as vl
from tasks.fewshot.backbones import Backbone, load_backbone
from tasks.fewshot.heads import HeadName
from tasks.fewshot.images import Transform
from tasks.fewshot.vision_only import VisionModel
from visionlora.errors import AdapterFileError
from visionlora.io.atomic import write_text_atomically

TENSORS = "adapter.safetensors"
DESCRIPTION = "adapter.json"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """Backbone, classes and image transform of one adapter."""

    backbone: str
    pretrained: str | None
    classes: Sequence[str]
    templates: Sequence[str]
    transform: dict[str, Any]
    method: str
    dataset: str
    random_weights: bool = False
    head: HeadName | None = None
    """Of a timm backbone."""
    image_size: int | None = None
    """Of a timm backbone, if not that of its weights."""
    format: int = FORMAT


def save_adapter(folder: Path, clip: Any, description: Description) -> None:
    """Write tensors and description; the description comes last and marks the pair complete."""
    vl.save(clip, folder / TENSORS)
    write_text_atomically(folder / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")


def find_adapter(folder: Path) -> Path:
    """Return the folder that holds the adapter: `folder` itself, or the first seed of a run."""
    if (folder / DESCRIPTION).is_file():
        return folder
    seeds = sorted(
        (file.parent for file in folder.glob(f"seed_*/{DESCRIPTION}")),
        key=lambda path: (
            int(path.name.removeprefix("seed_")) if path.name.removeprefix("seed_").isdigit() else 0
        ),
    )
    if not seeds:
        raise AdapterFileError(
            f"no adapter in {folder}: expected {DESCRIPTION} and {TENSORS} there or in seed_*/"
        )
    return seeds[0]


def read_description(folder: Path) -> tuple[Description, Transform]:
    """Return what is said beside the tensors in the folder of an adapter.

    Raises:
        AdapterFileError: the description is missing, damaged or of another format.
    """
    file = folder / DESCRIPTION
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        description = Description(**content)
        transform = Transform.from_dict(description.transform)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterFileError(f"{file} does not describe a few-shot adapter: {error}") from error
    if description.format != FORMAT:
        raise AdapterFileError(
            f"{file} has format {description.format}; this version reads format {FORMAT}"
        )
    return description, transform


def load_adapter(
    folder: Path, pretrained: str | None = None, backbone: Backbone | None = None
) -> tuple[Backbone, Description, Transform]:
    """Build the backbone that an adapter was trained on and put the adapter into it.

    Args:
        folder: A seed's folder, or a run's (its first seed is taken).
        pretrained: Weights to use instead of the recorded ones, for files that have moved.
        backbone: A backbone to use instead of building one.

    Raises:
        AdapterFileError: files that are missing, damaged or for another model.
    """
    folder = find_adapter(folder)
    description, transform = read_description(folder)
    if backbone is None:
        backbone = load_backbone(
            description.backbone, pretrained or description.pretrained, description.image_size
        )
    if isinstance(backbone.clip, VisionModel):
        backbone.clip.set_head(description.head or "linear", len(description.classes))
    vl.load(backbone.clip, folder / TENSORS)
    backbone.clip.eval()
    return backbone, description, transform
