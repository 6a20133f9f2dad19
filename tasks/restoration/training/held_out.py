"""Which pictures are trained on, which are validated on, and which are measured at the end.

The three are disjoint, the same for every method, seed and number of training pictures
(`pairs/split.py`), and their names are kept with the adapter. Held-out pictures are compared on
their middle, of one size, so that a validation takes seconds. Clean pictures are degraded once, by
a generator that depends on the picture's name alone.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from tasks.restoration.degradations.synthetic import TASKS
from tasks.restoration.images import Levels, Picture, pictures_below, read_picture, to_levels
from tasks.restoration.inference.restore import restore
from tasks.restoration.metrics import psnr, ssim
from tasks.restoration.pairs.layouts import PairPath, find_pairs
from tasks.restoration.pairs.sources import (
    PAIRS,
    Clean,
    Pairs,
    Source,
    read_pair,
    split_spec,
)
from tasks.restoration.pairs.split import split
from tasks.restoration.training.config import AdaptConfig


@dataclass(frozen=True)
class Example:
    """The middle of a held-out picture."""

    name: str
    degraded: Float[np.ndarray, "h w 3"]
    clean: Levels
    """In 8 bits, as figures are computed."""
    grey: bool = False
    """Whether the degraded picture is stored without colours."""


class Parts(NamedTuple):
    """The data of a run."""

    train: Source
    validation: list[Example]
    test: list[Example]
    names: dict[str, list[str]]


class Figures(NamedTuple):
    """Means over pictures; a picture that is restored exactly is left out of the first."""

    psnr: float
    ssim: float


class Pictures:
    """What a specification of data names, picture by picture."""

    def __init__(self, spec: str, layout: str) -> None:
        self.kind, path = split_spec(spec)
        self.items: Sequence[PairPath | Path]
        if self.kind == PAIRS:
            pairs = find_pairs(path, layout).pairs
            self.items, self.names = pairs, [pair.name for pair in pairs]
        else:
            root = Path(path).expanduser()
            files = pictures_below(root)
            self.items = files
            self.names = [str(file.relative_to(root).with_suffix("")) for file in files]

    def source(self, chosen: Sequence[int]) -> Source:
        """Return patches of some pictures."""
        items = [self.items[index] for index in chosen]
        if self.kind == PAIRS:
            return Pairs([item for item in items if isinstance(item, PairPath)])
        return Clean(
            [item for item in items if isinstance(item, Path)], TASKS[self.kind], self.kind
        )

    def example(self, index: int, side: int | None, seed: int) -> Example:
        """Return the middle of one picture."""
        name, item = self.names[index], self.items[index]
        if isinstance(item, PairPath):
            degraded, clean = (_middle(half, side) for half in read_pair(item))
            return Example(name, degraded.pixels, clean.in_8_bits, degraded.grey)
        clean = _middle(read_picture(item), side)
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        pixels, _ = TASKS[self.kind](clean.pixels, rng)
        return Example(name, pixels, clean.in_8_bits, clean.grey)


def load_parts(config: AdaptConfig) -> Parts:
    """Read all pictures of a run.

    Raises:
        DataError: too few pictures, or one that cannot be read.
    """
    own = Pictures(config.data, config.layout)
    found = split(
        own.names,
        test=config.test_images,
        validation=0 if config.val else config.val_images,
        train=config.train_images,
        seed=config.split_seed,
    )
    other = Pictures(config.val, config.layout) if config.val else own
    validated = tuple(range(len(other.names))) if config.val else found.validation
    side, seed = config.val_patch, config.split_seed
    chosen = {"train": found.train, "validation": validated, "test": found.test}
    return Parts(
        own.source(found.train),
        [other.example(index, side, seed) for index in validated],
        [own.example(index, side, seed) for index in found.test],
        {
            part: [(other if part == "validation" else own).names[index] for index in indices]
            for part, indices in chosen.items()
        },
    )


def measured(model: nn.Module, examples: Sequence[Example], device: torch.device) -> Figures:
    """Return how well a network restores pictures; its mode is put back after."""
    training = model.training
    model.to(device).eval()
    restored = [to_levels(restore(model, item.degraded, device=device)) for item in examples]
    model.train(training)
    return figures(restored, [item.clean for item in examples])


def untouched(examples: Sequence[Example]) -> Figures:
    """Return the figures of the degraded pictures."""
    return figures([to_levels(item.degraded) for item in examples], [i.clean for i in examples])


def figures(pictures: Sequence[Levels], targets: Sequence[Levels]) -> Figures:
    """Return mean PSNR and SSIM."""
    pairs = list(zip(pictures, targets, strict=True))
    ratios = [psnr(*pair) for pair in pairs]
    finite = [value for value in ratios if np.isfinite(value)]
    mean = float(np.mean(finite)) if finite else float("inf")
    return Figures(mean, float(np.mean([ssim(*pair) for pair in pairs])))


def _middle(picture: Picture, side: int | None) -> Picture:
    """Return the middle of a picture, all of it along a side that is too short."""
    if side is None:
        return picture
    places = [slice(max(0, (n - side) // 2), max(0, (n - side) // 2) + side) for n in picture.size]
    return Picture(np.ascontiguousarray(picture.levels[tuple(places)]), grey=picture.grey)
