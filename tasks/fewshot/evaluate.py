"""Accuracy on the test images: micro top-1, per class, and the confusion matrix.

One pass scores every image against every class. Class prompts do not see each other, so the
accuracy within a label set (base or new classes) is read off the same scores.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import visionlora as vl
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.images import Transform, decode_all, evaluation_pixels
from tasks.fewshot.sampling import Item
from visionlora.analysis.calibration import expected_calibration_error
from visionlora.compose import parse
from visionlora.errors import DataError
from visionlora.registry import get_method
from visionlora.training.device import autocast

BATCH = {"cpu": 64, "cuda": 256}
CACHE_BYTES = 2 << 30
"""Decoded test images stay in memory up to this size, since every seed needs them again."""


class TestImages:
    """Test images in batches; unreadable files are left out and remembered."""

    __test__ = False

    def __init__(self, items: Sequence[Item], transform: Transform) -> None:
        self.items = list(items)
        self.transform = transform
        self.skipped: list[str] = []
        self._cache: list[tuple[Tensor, Tensor]] | None = None

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(uint8 images, labels)`; the first pass decodes and finds unreadable files."""
        if self._cache is not None:
            yield from self._cache
            return
        keep: list[tuple[Tensor, Tensor]] = []
        fits = len(self.items) * 3 * self.transform.size**2 <= CACHE_BYTES
        skipped: list[str] = []
        for start in range(0, len(self.items), size):
            pixels, labels = [], []
            for item, image, reason in decode_all(
                self.items[start : start + size],
                lambda source: evaluation_pixels(source, self.transform),
            ):
                if image is None:
                    skipped.append(reason)
                else:
                    pixels.append(image)
                    labels.append(item.label)
            if pixels:
                batch = torch.stack(pixels), torch.tensor(labels)
                if fits:
                    keep.append(batch)
                yield batch
        self.skipped = skipped
        if fits:
            self._cache = keep


@dataclass(frozen=True)
class Scores:
    """Logits of every readable test image against every class, with the true labels."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    def accuracy(self, classes: range | None = None) -> float:
        """Return micro top-1 in percent, among `classes` only if given."""
        logits, labels = self.logits, self.labels
        if classes is not None:
            chosen = np.isin(labels, list(classes))
            logits = logits[chosen][:, classes.start : classes.stop]
            labels = labels[chosen] - classes.start
        if not len(labels):
            raise DataError("no readable test image in the classes to be scored")
        return float(100 * (logits.argmax(1) == labels).mean())

    def calibration_error(self) -> float:
        """Return the expected calibration error over 15 bins, in percent."""
        probabilities = torch.from_numpy(self.logits).double().softmax(-1)
        return 100 * expected_calibration_error(probabilities, torch.from_numpy(self.labels))

    def confusion(self) -> NDArray[np.int64]:
        """Return counts, true class by predicted class."""
        count = self.logits.shape[1]
        index = self.labels * count + self.logits.argmax(1)
        return np.bincount(index, minlength=count * count).reshape(count, count)

    def per_class(self) -> list[float | None]:
        """Return each class's accuracy in percent; None where there is no test image."""
        matrix = self.confusion()
        return [
            float(100 * row[index] / row.sum()) if row.sum() else None
            for index, row in enumerate(matrix)
        ]


def merged_for(clip: nn.Module, method: str) -> AbstractContextManager[Any]:
    """Return a context in which the adapter is merged; one that routes by input stays as it is."""
    return vl.merged(clip) if get_method(parse(method).method).delta.mergeable else nullcontext()


@torch.inference_mode()
def score(
    model: Classifier, images: TestImages, device: torch.device, precision: str = "fp32"
) -> Scores:
    """Score all test images, in evaluation mode."""
    model.eval()
    logits, labels = [], []
    with autocast(precision, device.type):
        classes = model.class_features()
        for pixels, truth in images.batches(BATCH.get(device.type, 64)):
            features = model.image_features(pixels.to(device))
            logits.append(model.compare(features, classes).float().cpu())
            labels.append(truth)
    if not labels:
        raise DataError(f"none of the {len(images.items)} test images can be read")
    return Scores(torch.cat(logits).numpy(), torch.cat(labels).numpy())


def harmonic_mean(base: float, new: float) -> float:
    """Return `2bn / (b + n)`, and 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0
