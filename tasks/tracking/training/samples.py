"""One training sample as a pure function of its number: drawn, cropped, varied, labelled.

    pair -> crops, that of the search jittered -> augmentation -> cells that the object touches

Sample n uses a generator seeded by (seed, n) and nothing else, so it does not matter which process
makes it, in which order, or whether the run was interrupted before. A draw that cannot be used,
because a file is unreadable or the jitter leaves nothing of the object, is followed by the next one
from the same generator.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tasks.tracking.geometry.crop import Mapping, channel_mean, crop, crop_mapping
from tasks.tracking.geometry.jitter import REACH, SCALE_STD, jittered_mapping
from tasks.tracking.geometry.raster import cells
from tasks.tracking.model.variants import TrackerShape
from tasks.tracking.training.augment import Augmentation, Augmented, Crop, as_they_are
from tasks.tracking.training.pairs import Pair, Source, View
from visionlora.errors import DataError

DRAWS = 50
"""Draws of one sample that may be unusable, one after the other, before training gives up."""


class Batch(NamedTuple):
    """What the model and its loss need; images in 8 bits."""

    template: UInt8[Tensor, "b 3 zside zside"]
    search: UInt8[Tensor, "b 3 xside xside"]
    mask: Int[Tensor, "b zgrid zgrid"]
    """1 on cells of the template that the object touches."""
    truth: Float[Tensor, "b 4"]
    """`xyxy` in the search crop, in units of its side."""
    positive: Bool[Tensor, "b xgrid xgrid"]
    """Cells of the search crop that the object touches."""


@dataclass(frozen=True)
class Sample:
    """One row of a batch."""

    row: Batch
    """Without the batch dimension."""
    unusable: tuple[str, ...]
    """Why draws were given up."""


class Samples:
    """The samples of a training run.

    Args:
        source: where pairs come from.
        shape: sizes of the crops.
        seed: seed of all draws.
        augmentation: how crops are varied; None for crops as they are.
        reach: farthest jitter of the search crop, in mean sides of the object.
        spread: deviation of the logarithm of its scale, along each axis by itself.
    """

    def __init__(
        self,
        source: Source,
        shape: TrackerShape,
        seed: int,
        augmentation: Augmentation | None = None,
        reach: float = REACH,
        spread: float = SCALE_STD,
    ) -> None:
        self.source = source
        self.shape = shape
        self.seed = seed
        self.augmentation = augmentation
        self.reach = reach
        self.spread = spread

    def __call__(self, number: int) -> Sample:
        """Return sample `number`.

        Raises:
            DataError: one draw after the other cannot be used.
        """
        rng = np.random.default_rng((self.seed, number))
        unusable: list[str] = []
        for _ in range(DRAWS):
            try:
                crops = self._crops(self.source.pair(rng), rng)
            except DataError as error:
                unusable.append(str(error))
                continue
            if crops is None:
                continue
            if self.augmentation is None:
                pair = as_they_are(*crops)
            else:
                pair = self.augmentation(*crops, rng)
            return Sample(self._labelled(*pair), tuple(unusable))
        why = (
            f"; last: {unusable[-1]}" if unusable else " (objects too long and thin to be cropped)"
        )
        raise DataError(f"{DRAWS} training pairs in a row could not be used{why}")

    def _crops(self, pair: Pair, rng: np.random.Generator) -> tuple[Crop, Crop] | None:
        shape = self.shape
        mapping = jittered_mapping(
            pair.search.box,
            shape.search_px,
            shape.search_factor,
            rng,
            self.reach,
            self.spread,
        )
        if mapping is None:
            return None
        plain = crop_mapping(pair.template.box, shape.template_px, shape.template_factor)
        template = _cut(pair.template, plain, shape.template_px)
        return template, _cut(pair.search, mapping, shape.search_px)

    def _labelled(self, template: Augmented, search: Augmented) -> Batch:
        shape = self.shape
        mask = cells(template.box, shape.template_px, shape.template_grid)
        positive = cells(search.box, shape.search_px, shape.search_grid)
        return Batch(
            _channels_first(template.pixels),
            _channels_first(search.pixels),
            torch.from_numpy(mask).long(),
            torch.from_numpy(search.box / shape.search_px).float(),
            torch.from_numpy(positive),
        )


def _cut(view: View, mapping: Mapping, side: int) -> Crop:
    """Cut a crop out of a frame; the box goes through the map that the pixels really follow."""
    frame = torch.from_numpy(view.image).permute(2, 0, 1)
    pixels, corrected = crop(frame, mapping, side, channel_mean(frame))
    return Crop(pixels.permute(1, 2, 0).numpy(), corrected.apply(view.box))


def _channels_first(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
