"""What all seeds of a run share: data, frozen backbone, settings, test images."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import visionlora as vl
from tasks.fewshot.backbones import Backbone, load_backbone
from tasks.fewshot.class_names import read_class_names
from tasks.fewshot.classifier import Classifier, adapter_targets, default_params
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.datasets import Dataset, for_validation, limited, load_dataset
from tasks.fewshot.evaluate import Scores, TestImages, harmonic_mean, score
from tasks.fewshot.images import refuse_unreadable
from tasks.fewshot.sampling import base_and_new
from tasks.fewshot.shots import Shots, load_shots
from tasks.fewshot.text import tokenize
from tasks.fewshot.vision_classifier import VisionClassifier
from tasks.fewshot.vision_only import HEAD, VisionModel
from visionlora.errors import DataError
from visionlora.registry import get_method
from visionlora.training.device import pick_device

RANDOM_TEST_IMAGES = 32
"""Random weights are for timing: without `--limit-test` only so many test images are scored."""


@dataclass
class Experiment:
    """What all seeds of a run share."""

    config: FewshotConfig
    dataset: Dataset
    backbone: Backbone
    device: torch.device
    tokens: Tensor
    test: TestImages
    lr_search: dict[str, Any] | None = None
    """What `--lr auto` tried, found and cost."""
    frozen: list[Any] = field(default_factory=list)
    """The test images, their features with no adapter, and their labels, once computed."""

    @property
    def trained_classes(self) -> range:
        """The labels that are trained: all, or the base half."""
        count = len(self.dataset.classes)
        return base_and_new(count)[0] if self.config.setting == "base-to-new" else range(count)

    def classifier(self, labels: range | None = None) -> Classifier:
        """Return the model as a classifier over `labels` (all, unless given)."""
        if isinstance(self.backbone.clip, VisionModel):
            return VisionClassifier(self.backbone.clip, self.backbone.transform).to(self.device)
        tokens = self.tokens if labels is None else self.tokens[:, labels.start : labels.stop]
        config, backbone = self.config, self.backbone
        model = Classifier(
            backbone.clip, tokens, backbone.transform, config.encoder, config.text_chunk
        )
        return model.to(self.device)

    def inject(self, seed: int) -> None:
        """Put a fresh adapter into the backbone, and a fresh head onto one without text."""
        clip, config = self.backbone.clip, self.config
        method = config.recipe.method
        exclude: list[str] = []
        targets = config.targets
        if targets is None:
            kinds = get_method(method).config.kinds
            targets, exclude = adapter_targets(clip, config.encoder, config.params or (), kinds)
        if isinstance(clip, VisionModel):
            assert config.head is not None
            clip.set_head(config.head, len(self.dataset.classes))
        vl.inject(clip, method, targets, exclude=exclude, **config.adapter_options(seed))
        if isinstance(clip, VisionModel):
            vl.freeze_base(clip, train=[HEAD])

    def shots(self, seed: int) -> Shots:
        """Draw and decode the training images of one seed."""
        return load_shots(
            self.dataset,
            self.config.shots,
            seed,
            self.backbone.transform,
            self.config.augmentation,
            labels=self.trained_classes,
            short_class=self.config.short_class,
        )

    def score(self) -> Scores:
        """Score the test images with the backbone as it is now."""
        return score(self.classifier(), self.test, self.device, self.config.precision)

    def figures(self, scores: Scores) -> dict[str, float]:
        """Return the accuracies of this setting and the calibration error, in percent."""
        found = {"accuracy": scores.accuracy(), "ece": scores.calibration_error()}
        if self.config.setting == "base-to-new":
            base, new = (scores.accuracy(part) for part in base_and_new(len(self.dataset.classes)))
            found |= {"base": base, "new": new, "harmonic_mean": harmonic_mean(base, new)}
        return found


def prepare(
    config: FewshotConfig, dataset: Dataset | None = None, backbone: Backbone | None = None
) -> Experiment:
    """Load what is not given, and check that everything fits, before anything is written."""
    device = pick_device(config.device)
    backbone = backbone or load_backbone(config.backbone, config.pretrained, config.image_size)
    dataset = dataset or load_dataset(config.dataset, config.root, config.own_split)
    if not dataset.train:
        raise DataError(f"{dataset.name} has test images only; train on another data set")
    if config.strict:
        refuse_unreadable([*dataset.train, *dataset.val, *dataset.test])
    if config.test_on == "val":
        dataset = for_validation(dataset)
    limit = config.limit_test or (RANDOM_TEST_IMAGES if backbone.random_weights else None)
    if limit is not None:
        dataset = limited(dataset, limit)
    if config.setting == "base-to-new" and len(dataset.classes) < 4:
        raise DataError(
            f"base-to-new needs at least 4 classes, {dataset.name} has {len(dataset.classes)}"
        )
    if config.class_names is not None:
        names = read_class_names(config.class_names, dataset.classes)
        dataset = replace(dataset, classes=names)
    config = config.resolved(dataset.templates)
    if config.params is None and config.targets is None:
        config = replace(config, params=default_params(backbone.clip, config.encoder))
    tokens = torch.empty(0, dtype=torch.long)
    if backbone.has_text:
        tokens = tokenize(dataset.classes, config.template or (), backbone.tokenizer)
    backbone.clip.to(device)
    experiment = Experiment(
        config,
        dataset,
        backbone,
        device,
        tokens,
        TestImages(dataset.test, backbone.transform),
    )
    experiment.inject(config.seed[0])
    try:
        _check_dynamics(experiment)
    finally:
        vl.eject(backbone.clip)
    return experiment


def _check_dynamics(experiment: Experiment) -> None:
    """Refuse dynamics that this model does not allow, by building them once."""
    config, clip = experiment.config, experiment.backbone.clip
    if config.recipe.dynamics:
        optimizer = torch.optim.AdamW(vl.parameter_groups(clip, lr=1.0, weight_decay=0.0))
        for item in config.recipe.build_dynamics(clip, optimizer, config.steps or 1):
            item.on_run_end()
