"""Features of the frozen backbone, and what is built on them: baselines and starts of heads.

They are the same for every method and setting, so those of the test images are kept for all seeds.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import visionlora as vl
from tasks.fewshot.baselines import Baseline, Support, linear_probe, prototypes, tip_adapter
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.evaluate import BATCH, Scores
from tasks.fewshot.experiment import Experiment
from tasks.fewshot.heads import LinearHead, PrototypeHead, prototype_logits
from tasks.fewshot.images import augment_batch, decode_all, evaluation_pixels
from tasks.fewshot.sampling import Item, few_shot
from tasks.fewshot.shots import Shots
from tasks.fewshot.vision_classifier import VisionClassifier
from visionlora.errors import DataError
from visionlora.record import adapter_names
from visionlora.training.device import autocast

VIEWS = 10
"""Augmented views of a shot that are averaged for a key of Tip-Adapter."""


def measure(experiment: Experiment, seed: int, shots: Shots) -> dict[str, dict[str, float]]:
    """Return the figures of every baseline that the run asks for, on its test images."""
    names = experiment.config.baselines
    if not names:
        return {}
    model = experiment.classifier().eval()
    features, labels = test_features(experiment, model)
    given = support(experiment, model, seed, shots)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        logits = _logits(name, experiment, model, given, shots, seed, features)
        scores = Scores(logits.float().numpy(), labels.numpy())
        found[name] = {key: round(value, 4) for key, value in experiment.figures(scores).items()}
    return found


def start_head(experiment: Experiment, model: Classifier, seed: int, shots: Shots) -> None:
    """Give the head of a vision model the values it has on frozen features; CLIP has no head."""
    if not isinstance(model, VisionClassifier):
        return
    head = model.clip.class_head
    given = support(experiment, model, seed, shots)
    if isinstance(head, LinearHead):
        probe = linear_probe(given)
        head.start(probe.weight, probe.bias)
    elif isinstance(head, PrototypeHead):
        head.start(prototypes(given))


def support(experiment: Experiment, model: Classifier, seed: int, shots: Shots) -> Support:
    """Return features of the unchanged shots, and of the validation images CoOp would draw."""
    dataset, config = experiment.dataset, experiment.config
    _, held = few_shot(dataset.train, dataset.val, config.shots, seed, config.short_class)
    classes = experiment.trained_classes
    held = [item for item in held if item.label in classes]
    features, _ = item_features(experiment, model, shots.items)
    val_features, val_labels = item_features(experiment, model, held)
    if not len(val_labels):
        return Support(features, shots.labels)
    return Support(features, shots.labels, val_features, val_labels - classes.start)


def test_features(experiment: Experiment, model: Classifier) -> tuple[Tensor, Tensor]:
    """Return features and labels of the readable test images, computed once."""
    kept = experiment.frozen
    if not kept or kept[0] is not experiment.test:
        size = BATCH.get(experiment.device.type, 64)
        parts = [
            (encode(experiment, model, pixels), labels)
            for pixels, labels in experiment.test.batches(size)
        ]
        if not parts:
            raise DataError(f"none of the {len(experiment.test.items)} test images can be read")
        joined = [torch.cat([part[index] for part in parts]) for index in (0, 1)]
        kept[:] = [experiment.test, *joined]
    return kept[1], kept[2]


def item_features(
    experiment: Experiment, model: Classifier, items: Sequence[Item]
) -> tuple[Tensor, Tensor]:
    """Return features and labels of items, without those that cannot be read."""
    transform = experiment.backbone.transform
    found = [
        (pixels, item.label)
        for item, pixels, _ in decode_all(
            items, lambda source: evaluation_pixels(source, transform)
        )
        if pixels is not None
    ]
    labels = torch.tensor([label for _, label in found])
    return encode(experiment, model, [pixels for pixels, _ in found]), labels


@torch.no_grad()
def encode(experiment: Experiment, model: Classifier, images: Sequence[Tensor] | Tensor) -> Tensor:
    """Return features of `uint8` pictures of the input size, in float32 on the CPU."""
    device = experiment.device
    size = BATCH.get(device.type, 64)
    training = model.training
    model.eval()
    frozen: Any = vl.disabled(model.clip) if adapter_names(model.clip) else nullcontext()
    with frozen, autocast(experiment.config.precision, device.type):
        parts = [
            model.image_features(torch.stack(list(images[start : start + size])).to(device))
            .float()
            .cpu()
            for start in range(0, len(images), size)
        ]
    model.train(training)
    return torch.cat(parts) if parts else torch.empty(0, 0)


def augmented_features(
    experiment: Experiment, model: Classifier, shots: Shots, seed: int
) -> Tensor:
    """Return unit means of the features of augmented views of the shots."""
    augment, side = experiment.config.augmentation, experiment.backbone.transform.size
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1)
    for _ in range(1 if augment == "none" else VIEWS):
        views = augment_batch(shots.images, side, augment, generator)
        total = total + encode(experiment, model, views)
    return torch.nn.functional.normalize(total, dim=-1)


@torch.no_grad()
def _logits(
    name: Baseline,
    experiment: Experiment,
    model: Classifier,
    given: Support,
    shots: Shots,
    seed: int,
    features: Tensor,
) -> Tensor:
    if name == "linear-probe":
        return linear_probe(given)(features)
    if name == "prototype":
        return prototype_logits(features, prototypes(given))
    keys = augmented_features(experiment, model, shots, seed)
    text = model.class_features().float().cpu()
    return tip_adapter(given, keys, text)(features)
