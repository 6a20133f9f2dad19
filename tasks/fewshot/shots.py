"""The training images of one run: drawn, decoded once, and served as reproducible batches."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.fewshot.datasets import Dataset
from tasks.fewshot.images import Augmentation, Transform, augment_batch, cached_pixels, decode_all
from tasks.fewshot.sampling import Item, ShortClass, few_shot, spares
from visionlora.errors import DataError
from visionlora.training.sampler import StepSampler, process, shard


@dataclass(frozen=True)
class Shots:
    """Decoded training images, their labels from 0, their items, and files that were left out."""

    images: list[Tensor]
    labels: Tensor
    items: list[Item]
    skipped: list[str]


def load_shots(
    dataset: Dataset,
    shots: int,
    seed: int,
    transform: Transform,
    augment: Augmentation,
    *,
    labels: range | None = None,
    short_class: ShortClass = "keep",
) -> Shots:
    """Draw the K shots of all classes, and decode those of `labels` (all, unless given).

    An unreadable image is replaced by another one of its class, so that the shots stay K where
    the class has enough.

    Raises:
        DataError: a class without any readable image.
    """
    drawn, _ = few_shot(dataset.train, dataset.val, shots, seed, short_class)
    reserve = spares(dataset.train, drawn, seed)
    labels = labels or range(len(dataset.classes))
    drawn = [item for item in drawn if item.label in labels]
    kept: list[tuple[Item, Tensor]] = []
    skipped: dict[str, None] = {}
    while drawn:
        stand_ins: list[Item] = []
        for item, image, reason in decode_all(
            drawn, lambda source: cached_pixels(source, transform, augment)
        ):
            if image is not None:
                kept.append((item, image))
                continue
            skipped[reason] = None
            if reserve[item.label]:
                stand_ins.append(reserve[item.label].pop())
        drawn = stand_ins
    found = Counter(item.label for item, _ in kept)
    for label in labels:
        if not found[label]:
            raise DataError(f"class {dataset.classes[label]!r} has no readable training image")
    return Shots(
        [image for _, image in kept],
        torch.tensor([item.label - labels.start for item, _ in kept]),
        [item for item, _ in kept],
        list(skipped),
    )


class Batches:
    """Batch number `step` as a pure function: shuffled epochs, augmentation seeded by the step.

    Fewer images than `batch_size` make a smaller batch. Under several processes each one gets its
    own part of the batch.
    """

    def __init__(
        self, shots: Shots, size: int, batch_size: int, augment: Augmentation, seed: int
    ) -> None:
        self.shots = shots
        self.size = size
        self.augment = augment
        self.seed = seed
        count = len(shots.images)
        self.sampler = StepSampler(count, min(batch_size, count), seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return `(uint8 images, labels)` of one micro-step."""
        chosen = self.indices(step)
        images = augment_batch(
            [self.shots.images[index] for index in chosen],
            self.size,
            self.augment,
            _generator(self.seed, step, process()[0]),
        )
        return images, self.shots.labels[chosen]

    def indices(self, step: int) -> list[int]:
        """Return which images this process gets in batch `step`."""
        return shard(self.sampler.indices(step), *process())


class FeatureBatches:
    """Batches of image features computed once, for a frozen vision tower."""

    def __init__(self, batches: Batches, features: Tensor) -> None:
        self.batches = batches
        self.features = features

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return `(features, labels)` of one micro-step."""
        chosen = self.batches.indices(step)
        return self.features[chosen], self.batches.shots.labels[chosen]


def _generator(*words: int) -> torch.Generator:
    """Return a CPU generator for one purpose, seeded by whole numbers."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)
