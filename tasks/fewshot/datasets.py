"""Data sets by name: `digits`, `folder:PATH`, or one of the public few-shot sets.

A data set is its class names, prompt templates and labelled items of three splits; nothing is
decoded here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.fewshot.folder import read_folder
from tasks.fewshot.public_sets import PUBLIC_SETS, read_public_set
from tasks.fewshot.sampling import Item, by_class, restrict
from visionlora.errors import ConfigError, DataError, nearest

DEFAULT_TEMPLATE = "a photo of a {}."
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION_IMAGES = 50
"""Of a class, where training images are held out for validation."""
DIGIT_TRAIN_POOL = 898
"""The first 898 digits are the training pool, the last 899 the test set: other writers."""


@dataclass(frozen=True)
class Dataset:
    """Class names and labelled items; `split` says whose division into train and test it is."""

    name: str
    classes: tuple[str, ...]
    train: Sequence[Item]
    val: Sequence[Item]
    test: Sequence[Item]
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    split: str = "official"

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(f"data set {self.name} has one class only; at least 2 needed")
        if self.name in PUBLIC_SETS:
            return  # ImageNet's published names have two pairs of twins ("missile", "sunglasses")
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise DataError(f"two classes of {self.name} are both called {twice[0]!r}")


def dataset_names() -> list[str]:
    """Return every name that `--dataset` takes, `folder:PATH` first."""
    return ["folder:PATH", "digits", *PUBLIC_SETS]


def load_dataset(name: str, root: str | Path = "data", own_split: bool = False) -> Dataset:
    """Return the data set called `name`; public sets are looked for, or downloaded, under `root`.

    Args:
        name: One of `dataset_names()`.
        root: Where the public sets are.
        own_split: Divide a public set here whose published split file is missing.

    Raises:
        VisionLoraError: an unknown name, or data that are missing or unusable.
    """
    if name.startswith("folder:"):
        path = name.removeprefix("folder:")
        if not path:
            raise DataError("--dataset folder: needs a path, as in folder:pictures")
        classes, splits, own = read_folder(path)
        split = "sampled" if own else "official"
        return Dataset(name, classes, splits["train"], splits["val"], splits["test"], split=split)
    if name == "digits":
        return digits()
    if name in PUBLIC_SETS:
        classes, splits, split = read_public_set(name, Path(root).expanduser(), own_split)
        templates = (PUBLIC_SETS[name].template,)
        return Dataset(
            name, classes, splits["train"], splits["val"], splits["test"], templates, split
        )
    if Path(name).is_dir():
        raise ConfigError(f"unknown data set {name!r}; for a folder write --dataset folder:{name}")
    raise ConfigError(
        f"unknown data set {name!r}{nearest(name, dataset_names())}; "
        f"one of {', '.join(dataset_names())}"
    )


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits (8x8), in their original order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the digits need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    items = [Item(image, int(label)) for image, label in zip(pixels, bunch.target, strict=True)]
    return Dataset(
        "digits",
        DIGIT_NAMES,
        items[:DIGIT_TRAIN_POOL],
        [],
        items[DIGIT_TRAIN_POOL:],
        templates=("a photo of {}.",),
    )


def for_validation(dataset: Dataset) -> Dataset:
    """Return `dataset` with validation images in the place of the test images.

    A data set without any gives the last third of each class's training images, in their order; of
    a third that is large only so many are tested as ImageNet has.
    """
    if dataset.val:
        return replace(dataset, test=dataset.val, val=[])
    train: list[Item] = []
    test: list[Item] = []
    for group in by_class(dataset.train).values():
        if len(group) < 2:
            raise DataError(
                f"class {dataset.classes[group[0].label]!r} has one training image: none is left "
                "for validation"
            )
        kept = len(group) - max(1, len(group) // 3)
        train += group[:kept]
        test += group[kept:][:VALIDATION_IMAGES]
    return replace(dataset, train=train, test=test)


def of_classes(dataset: Dataset, labels: range) -> Dataset:
    """Return the part of `dataset` that belongs to some classes, relabelled from 0."""
    train, val, test = (
        restrict(part, labels) for part in (dataset.train, dataset.val, dataset.test)
    )
    classes = dataset.classes[labels.start : labels.stop]
    return replace(dataset, classes=classes, train=train, val=val, test=test)


def limited(dataset: Dataset, limit: int) -> Dataset:
    """Return `dataset` with at most `limit` test images, spread over the whole test set."""
    if limit >= len(dataset.test):
        return dataset
    step = len(dataset.test) / limit
    return replace(dataset, test=[dataset.test[int(index * step)] for index in range(limit)])
