"""The figures of one restored picture and of its input, their table and their means.

Each in RGB and in Y, since papers differ: derain, JPEG and super-resolution are mostly given in Y,
the other tasks in RGB. A mean leaves out the PSNR of pictures that are exact, which is infinite.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tasks.restoration.metrics import Channel, psnr, ssim
from visionlora.io.atomic import write_text_atomically

Picture8 = UInt8[np.ndarray, "h w 3"]
CHANNELS: tuple[Channel, ...] = ("rgb", "y")
NAMES = tuple(f"{figure}_{channel}" for channel in CHANNELS for figure in ("psnr", "ssim"))
Quality = dict[str, float]
"""A figure for each of NAMES, and `lpips` where that is measured."""


def quality(picture: Picture8, target: Picture8, crop: int = 0) -> Quality:
    """Return the figures of a picture.

    Raises:
        DataError: pictures of different size, or too small to be measured.
    """
    found: Quality = {}
    for channel in CHANNELS:
        found[f"psnr_{channel}"] = psnr(picture, target, channel, crop)
        found[f"ssim_{channel}"] = ssim(picture, target, channel, crop)
    return found


@dataclass(frozen=True)
class Measured:
    """A picture before and after."""

    name: str
    size: tuple[int, int]
    before: Quality
    after: Quality
    seconds: float

    @property
    def megapixels(self) -> float:
        """Size of the picture."""
        return self.size[0] * self.size[1] / 1e6

    def gain(self, channel: Channel) -> float:
        """Return by how many dB the picture became better; 0 where both are exact."""
        before, after = (q[f"psnr_{channel}"] for q in (self.before, self.after))
        return 0.0 if before == after else after - before


@dataclass(frozen=True)
class Mean:
    """The mean of one figure."""

    value: float | None
    """None where no picture has a finite one."""
    left_out: int
    """Pictures whose figure is not finite."""


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of what is finite."""
    finite = [value for value in values if math.isfinite(value)]
    return Mean(float(np.mean(finite)) if finite else None, len(values) - len(finite))


def means(pictures: Sequence[Measured]) -> dict[str, Mean]:
    """Return the mean of every figure, those of the inputs as `<name>_input`."""
    names = list(pictures[0].after)
    after = {name: mean([item.after[name] for item in pictures]) for name in names}
    before = {f"{name}_input": mean([item.before[name] for item in pictures]) for name in names}
    return {**after, **before}


def write_table(path: Path, pictures: Sequence[Measured]) -> Path:
    """Write a row for every picture."""
    names = list(pictures[0].after)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    gains = [f"gain_{channel}" for channel in CHANNELS]
    inputs = [f"{name}_input" for name in names]
    table.writerow(["picture", "width", "height", *names, *inputs, *gains, "seconds"])
    for item in pictures:
        values = [*item.after.values(), *item.before.values(), *map(item.gain, CHANNELS)]
        numbers = [f"{value:.4f}" for value in values]
        table.writerow([item.name, item.size[1], item.size[0], *numbers, f"{item.seconds:.4f}"])
    return write_text_atomically(path, text.getvalue())
