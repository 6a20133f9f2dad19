"""Classify a user's own pictures with a saved adapter: a CSV file and a picture grid.

A folder of any size streams through: pictures are decoded, classified and written batch by batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tasks.fewshot.adapter_files import Description, load_adapter
from tasks.fewshot.adapter_zip import unpacked
from tasks.fewshot.backbones import TINY, Backbone
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.evaluate import BATCH, merged_for
from tasks.fewshot.folder import list_images
from tasks.fewshot.images import Transform, decode_all, evaluation_pixels, open_image
from tasks.fewshot.pictures import save_grid
from tasks.fewshot.predictions import Prediction, PredictionFile
from tasks.fewshot.report import print_note
from tasks.fewshot.sampling import Item
from tasks.fewshot.text import tokenize
from tasks.fewshot.vision_classifier import VisionClassifier
from tasks.fewshot.vision_only import VisionModel
from visionlora.errors import ConfigError, DataError
from visionlora.training import Progress
from visionlora.training.device import pick_device, threads

PROGRESS_SECONDS = 5.0
"""How often progress is said where there is no terminal for a bar."""
NAMED_UNREADABLE = 5
"""So many unreadable pictures are named on the screen, and all of them in the file."""
GRID_IMAGES = 36
THUMBNAIL = 128


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Name the classes of the pictures in a folder with an adapter that a run has saved."""

    adapter: str
    """Folder of a run or of one of its seeds, or the zip file that scripts/app.py hands out."""
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
    """Stop at the first unreadable picture instead of noting it."""

    def __post_init__(self) -> None:
        """Check the range of the grid."""
        if self.grid < 1:
            raise ConfigError(f"--grid must be at least 1, got {self.grid}")


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict, write predictions.csv and grid.png, and return what was found."""
    folder = Path(config.images).expanduser()
    if not folder.is_dir():
        raise DataError(f"picture folder {folder} does not exist or is no folder")
    files = list_images(folder)
    if not files:
        raise DataError(f"no pictures in {folder}")
    device = pick_device(config.device)
    with unpacked(Path(config.adapter).expanduser()) as place:
        backbone, description, transform = load_adapter(place, config.pretrained)
    output = Path(config.output or f"runs/fewshot/predict-{folder.resolve().name}").expanduser()
    wanted = spread(files, config.grid)
    shown: list[Prediction] = []
    unreadable: list[Prediction] = []
    done = 0
    with (
        PredictionFile(output / "predictions.csv", folder) as table,
        Progress(len(files), "predict", plain_every=PROGRESS_SECONDS) as progress,
        classifying(backbone, description, transform, device) as model,
    ):
        for batch in predict(model, files, description.classes, transform, device):
            bad = [item for item in batch if item.error]
            if bad and config.strict:
                raise DataError(f"unreadable picture {bad[0].file}: {bad[0].error}")
            table.write(batch)
            unreadable += bad
            shown += [item for item in batch if item.file in wanted and not item.error]
            done += len(batch)
            progress.show(done, f"{len(unreadable)} unreadable")
        if len(unreadable) == len(files):
            raise DataError(
                f"none of the {len(files)} pictures in {folder} can be read; "
                f"{unreadable[0].file.name}: {unreadable[0].error}"
            )
    if shown:
        write_grid(shown, output / "grid.png")
    _report(len(files), unreadable, output, description.random_weights)
    return {
        "predicted": len(files) - len(unreadable),
        "skipped": len(unreadable),
        "output": str(output),
    }


@contextmanager
def classifying(
    backbone: Backbone, description: Description, transform: Transform, device: torch.device
) -> Iterator[Classifier]:
    """Return a context with the classifier of an adapter that is loaded in `backbone`, merged."""
    if isinstance(backbone.clip, VisionModel):
        model: Classifier = VisionClassifier(backbone.clip, transform)
    else:
        tokens = tokenize(description.classes, description.templates, backbone.tokenizer)
        model = Classifier(backbone.clip, tokens, transform, "both")
    model.to(device).eval()
    few = threads(1 if description.backbone == TINY else None)
    with few, merged_for(model.clip, description.method):
        model.cache_text()
        yield model


def predict(
    model: Classifier,
    files: Sequence[Path],
    classes: Sequence[str],
    transform: Transform,
    device: torch.device,
    best: int = 2,
) -> Iterator[list[Prediction]]:
    """Yield predictions in the order of `files`, one batch at a time, with the `best` classes.

    Only one batch of pictures is in memory, at the model's input size; files are decoded on a few
    threads, which hold one full-size picture each.
    """
    size = BATCH.get(device.type, 64)
    for start in range(0, len(files), size):
        part = files[start : start + size]
        scored, errors = _scores(model, part, transform, device, min(best, len(classes)))
        found = iter(scored)
        yield [
            Prediction(file, error=error) if error else _named(file, *next(found), classes)
            for file, error in zip(part, errors, strict=True)
        ]


@torch.inference_mode()
def _scores(
    model: Classifier, files: Sequence[Path], transform: Transform, device: torch.device, best: int
) -> tuple[list[tuple[list[float], list[int]]], list[str]]:
    """Return the best probabilities and labels of the readable files, and the errors of all."""
    pixels, errors = _decode(files, transform)
    if not pixels:
        return [], errors
    logits = model(torch.stack(pixels).to(device)).float()
    top = logits.softmax(-1).topk(best)
    return list(zip(top.values.tolist(), top.indices.tolist(), strict=True)), errors


def _decode(files: Sequence[Path], transform: Transform) -> tuple[list[Tensor], list[str]]:
    """Return the pixels of the readable files, and for every file its error or nothing."""
    pixels: list[Tensor] = []
    errors: list[str] = []
    items = [Item(file, 0) for file in files]
    for item, image, reason in decode_all(
        items, lambda source: evaluation_pixels(source, transform)
    ):
        if image is not None:
            pixels.append(image)
        errors.append(reason.removeprefix(f"{item.source}: "))
    return pixels, errors


def _named(
    file: Path, values: list[float], labels: list[int], classes: Sequence[str]
) -> Prediction:
    return Prediction(file, tuple(classes[label] for label in labels), tuple(values))


def spread(files: Sequence[Path], count: int) -> set[Path]:
    """Return up to `count` of the files, evenly spread over them."""
    step = max(1.0, len(files) / count)
    return {files[int(index * step)] for index in range(min(count, len(files)))}


def write_grid(shown: Sequence[Prediction], path: Path) -> None:
    """Draw pictures with class and probability."""
    thumbnails = [thumbnail(item.file) for item in shown]
    captions = [f"{item.names[0]}\n{100 * item.probabilities[0]:.0f} %" for item in shown]
    save_grid(thumbnails, captions, path)


def thumbnail(file: Path) -> NDArray[np.uint8]:
    """Return a small square picture with the whole image in its middle."""
    size = (THUMBNAIL, THUMBNAIL)
    return np.asarray(ImageOps.pad(open_image(file), size, Image.Resampling.BICUBIC, color="white"))


def _report(count: int, unreadable: list[Prediction], output: Path, random_weights: bool) -> None:
    if random_weights:
        print_note("random weights: the predictions mean nothing")
    for item in unreadable[:NAMED_UNREADABLE]:
        print_note(f"unreadable: {item.file}: {item.error}")
    if unreadable:
        print_note(
            f"{len(unreadable)} of {count} pictures are unreadable; "
            "the column `error` of predictions.csv says why"
        )
    print_note(
        f"{count - len(unreadable)} pictures: {output / 'predictions.csv'}, {output / 'grid.png'}"
    )
