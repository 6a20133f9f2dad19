"""Before and after, beside the target, with maps of what differs.

    input | restored | target | |input - target| | |restored - target|

A large picture is cut to the place where its input differs most from the target. Both maps of a row
have one scale, which is written below them: the level at which 99 of 100 pixels of the input's map
lie. Figures are those of the whole picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tasks.restoration.figures import Measured
from tasks.restoration.images import Picture, write_levels
from tasks.restoration.metrics import Channel
from tasks.restoration.sheet import Cell, sheet

Picture8 = UInt8[np.ndarray, "h w 3"]
SIDE = 224
"""Side of what is shown of a picture."""
LEAST_SCALE = 8
"""Levels; smaller differences would look larger than they are."""


@dataclass(frozen=True)
class Shown:
    """What a sheet shows of one picture."""

    name: str
    size: tuple[int, int]
    corner: tuple[int, int]
    given: Picture8
    restored: Picture8
    target: Picture8


def shown(name: str, given: Picture8, restored: Picture8, target: Picture8) -> Shown:
    """Cut a picture to the place where the input differs most from the target."""
    top, left = worst_place(given, target)
    place = (slice(top, top + SIDE), slice(left, left + SIDE))
    cuts = (np.ascontiguousarray(picture[place]) for picture in (given, restored, target))
    return Shown(name, target.shape[:2], (top, left), *cuts)


def worst_place(one: Picture8, other: Picture8) -> tuple[int, int]:
    """Return the top left corner of the window with the largest squared error."""
    error = (one.astype(np.float32) - other.astype(np.float32)) ** 2
    height, width = (min(SIDE, extent) for extent in error.shape[:2])
    sums = np.pad(error.sum(axis=2, dtype=np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = (sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]) + sums[
        :-height, :-width
    ]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return int(top), int(left)


def row(item: Shown, captions: tuple[str, str]) -> list[Cell]:
    """Return the cells of a picture.

    Args:
        item: what is shown of it.
        captions: the figures of its input and of what was made of it.
    """
    before, after = (difference(part, item.target) for part in (item.given, item.restored))
    scale = max(LEAST_SCALE, round(float(np.percentile(before, 99))))
    height, width = item.size
    place = f"{width} x {height}"
    if max(item.size) > SIDE:
        place += f", from x {item.corner[1]}, y {item.corner[0]}"
    return [
        (larger(item.given), f"{item.name}\n{place}\n{captions[0]}"),
        (larger(item.restored), captions[1]),
        (larger(item.target), "target"),
        (larger(coloured(before, scale)), f"input - target, white from {scale} levels"),
        (larger(coloured(after, scale)), f"restored - target, white from {scale} levels"),
    ]


def difference(one: Picture8, other: Picture8) -> Float[np.ndarray, "h w"]:
    """Return the mean distance of the channels, in levels."""
    distance = np.abs(one.astype(np.float32) - other.astype(np.float32))
    return np.asarray(distance.mean(axis=2))


def coloured(map_: Float[np.ndarray, "h w"], scale: float) -> Picture8:
    """Return a map from black over red and yellow to white."""
    grey = np.rint((map_ / scale).clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(grey, cv2.COLORMAP_HOT)[..., ::-1])


def larger(picture: Picture8) -> Picture8:
    """Magnify a small picture by a whole number, without smoothing."""
    factor = max(1, SIDE // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def write_sheet(path: Path, rows: Sequence[Sequence[Cell]]) -> Path:
    """Write rows as one picture."""
    made = sheet(rows)
    return write_levels(path, made, Picture(made))


class Extremes:
    """The pictures that lost and those that gained most; what others showed is forgotten."""

    def __init__(self, count: int, channel: Channel) -> None:
        self.count = count
        self.channel = channel
        self._kept: list[tuple[Measured, Shown]] = []

    def add(self, measured: Measured, picture: Shown) -> None:
        """Look at one more picture."""
        self._kept.append((measured, picture))
        self._kept.sort(key=lambda item: item[0].gain(self.channel))
        if len(self._kept) > 2 * self.count:
            del self._kept[self.count]

    def write(self, folder: Path) -> None:
        """Write both sheets."""
        for name, kept in (("worst", self._kept), ("best", self._kept[::-1])):
            if kept and self.count:
                rows = [row(item, self._captions(figures)) for figures, item in kept[: self.count]]
                write_sheet(folder / f"{name}.png", rows)

    def _captions(self, item: Measured) -> tuple[str, str]:
        unit = "dB in Y" if self.channel == "y" else "dB"
        before, after = (
            f"{figures['psnr_' + self.channel]:.2f} {unit}, "
            f"SSIM {figures['ssim_' + self.channel]:.4f}"
            for figures in (item.before, item.after)
        )
        return f"input, {before}", f"restored, {after}\n{item.gain(self.channel):+.2f} dB"
