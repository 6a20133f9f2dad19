"""Classify a user's own pictures with a saved adapter: a CSV file and a picture grid."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tasks.fewshot.adapter_files import load_adapter
from tasks.fewshot.backbones import TINY
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.evaluate import BATCH, merged_for, pick_device, threads
from tasks.fewshot.folder import list_images
from tasks.fewshot.images import Transform, decode_all, evaluation_pixels, open_image
from tasks.fewshot.pictures import save_grid
from tasks.fewshot.report import print_note
from tasks.fewshot.sampling import Item
from tasks.fewshot.text import tokenize
from visionlora.errors import ConfigError, DataError
from visionlora.io.atomic import write_text_atomically

GRID_IMAGES = 36
THUMBNAIL = 128


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Name the classes of the pictures in a folder with an adapter that a run has saved."""

    adapter: str
    """Folder of a run, or of one of its seeds."""
    images: str
    """Folder of pictures; sub-folders are searched too."""
    output: str | None = None
    """Folder for predictions.csv and grid.png; default runs/fewshot/predict-<folder>."""
    pretrained: str | None = None
    """Weights of the backbone, if they have moved since training."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    grid: int = GRID_IMAGES
    """Number of pictures in the grid, spread over the folder."""
    strict: bool = False
    """Refuse unreadable pictures instead of leaving them out."""

    def __post_init__(self) -> None:
        """Check the range of the grid."""
        if self.grid < 1:
            raise ConfigError(f"--grid must be at least 1, got {self.grid}")


@dataclass(frozen=True)
class Prediction:
    """The two likeliest classes of one picture."""

    file: Path
    names: tuple[str, str]
    probabilities: tuple[float, float]


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict, write predictions.csv and grid.png, and return what was found."""
    folder = Path(config.images).expanduser()
    if not folder.is_dir():
        raise DataError(f"picture folder {folder} does not exist or is no folder")
    files = list_images(folder)
    if not files:
        raise DataError(f"no pictures in {folder}")
    device = pick_device(config.device)
    backbone, description, transform = load_adapter(
        Path(config.adapter).expanduser(), config.pretrained
    )
    tokens = tokenize(description.classes, description.templates, backbone.tokenizer)
    model = Classifier(backbone.clip, tokens, transform, "both").to(device).eval()
    merged = merged_for(model.clip, description.method)
    with threads(1 if description.backbone == TINY else None), merged:
        found, skipped = predict(
            model, files, description.classes, transform, device, config.strict
        )
    if not found:
        raise DataError(f"none of the {len(files)} pictures in {folder} can be read")
    output = Path(config.output or f"runs/fewshot/predict-{folder.resolve().name}").expanduser()
    write_csv(found, folder, output / "predictions.csv")
    write_grid(found, config.grid, output / "grid.png")
    if description.random_weights:
        print_note("random weights: the predictions mean nothing")
    if skipped:
        print_note(f"{len(skipped)} unreadable pictures left out, first: {skipped[0]}")
    print_note(f"{len(found)} pictures: {output / 'predictions.csv'}, {output / 'grid.png'}")
    return {"predicted": len(found), "skipped": len(skipped), "output": str(output)}


@torch.inference_mode()
def predict(
    model: Classifier,
    files: list[Path],
    classes: Any,
    transform: Transform,
    device: torch.device,
    strict: bool = False,
) -> tuple[list[Prediction], list[str]]:
    """Return a prediction for every readable file, and why the others cannot be read."""
    found: list[Prediction] = []
    skipped: list[str] = []
    model.cache_text()
    size = BATCH.get(device.type, 64)
    for start in range(0, len(files), size):
        kept: list[tuple[Path, Tensor]] = []
        items = [Item(file, 0) for file in files[start : start + size]]
        for item, pixels, reason in decode_all(
            items, lambda source: evaluation_pixels(source, transform)
        ):
            if pixels is not None:
                kept.append((Path(str(item.source)), pixels))
            elif strict:
                raise DataError(f"unreadable picture {reason}")
            else:
                skipped.append(reason)
        if not kept:
            continue
        logits = model(torch.stack([pixels for _, pixels in kept]).to(device))
        best = logits.float().softmax(-1).topk(2)
        for (file, _), values, labels in zip(
            kept, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            names = classes[labels[0]], classes[labels[1]]
            found.append(Prediction(file, names, (values[0], values[1])))
    return found, skipped


def write_csv(found: list[Prediction], folder: Path, path: Path) -> None:
    """Write one line per picture: name, class, probability, runner-up."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "probability", "second_class", "second_probability"])
    for item in found:
        first, second = item.probabilities
        name = item.file.relative_to(folder).as_posix()
        writer.writerow([name, item.names[0], f"{first:.4f}", item.names[1], f"{second:.4f}"])
    write_text_atomically(path, text.getvalue())


def write_grid(found: list[Prediction], count: int, path: Path) -> None:
    """Draw up to `count` pictures, spread over all of them, with class and probability."""
    step = max(1.0, len(found) / count)
    chosen = [found[int(index * step)] for index in range(min(count, len(found)))]
    thumbnails = [thumbnail(item.file) for item in chosen]
    captions = [f"{item.names[0]}\n{100 * item.probabilities[0]:.0f} %" for item in chosen]
    save_grid(thumbnails, captions, path)


def thumbnail(file: Path) -> NDArray[np.uint8]:
    """Return a small square picture with the whole image in its middle."""
    size = (THUMBNAIL, THUMBNAIL)
    return np.asarray(ImageOps.pad(open_image(file), size, Image.Resampling.BICUBIC, color="white"))
