"""Synthetic videos of a red rectangle, and trackers that see where it is.

The rectangle covers border pixels in part, so its position is known to a fraction of a pixel.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tasks.tracking.images import MEAN, STD
from tasks.tracking.model.lorat import Prediction
from tasks.tracking.model.variants import TrackerShape
from tasks.tracking.sequences.sequence import Sequence
from tasks.tracking.trackers.base import Output, checked_box

SHAPE = TrackerShape(template_px=56, search_px=112)


def picture(box, width=160, height=120, blue=60):
    """Return a blue frame with a red rectangle `x, y, w, h`, clipped at the border."""
    x, y, w, h = box
    columns = _covered(width, x, x + w)
    rows = _covered(height, y, y + h)
    share = np.outer(rows, columns)
    red, rest = 255 * share, blue * (1 - share)
    return np.stack([red, np.zeros_like(red), rest], axis=-1).round().astype(np.uint8)


def path_of(count, seed=0, start=(60.0, 45.0, 24.0, 20.0)):
    """Return the boxes of a rectangle that wanders and changes its size."""
    generator = np.random.default_rng(seed)
    steps = np.column_stack(
        [generator.uniform(-4, 4, (count, 2)), generator.uniform(-0.5, 0.5, (count, 2))]
    )
    steps[0] = 0
    boxes = np.array(start) + steps.cumsum(axis=0)
    return np.clip(boxes, [30, 20, 18, 18], [100, 75, 30, 30])


def sequence(folder: Path, name: str, count: int, seed: int = 0) -> Sequence:
    """Write a video as PNG files and return it."""
    boxes = path_of(count, seed)
    (folder / name).mkdir(parents=True)
    files = [folder / name / f"{index:08d}.png" for index in range(1, count + 1)]
    for file, box in zip(files, boxes, strict=True):
        Image.fromarray(picture(box)).save(file)
    return Sequence(name=name, frames=tuple(files), boxes=boxes)


def where(red):
    """Return x1, y1, x2, y2 of the rectangle in a plane of red from 0 to 1."""
    columns, rows = red.sum(0), red.sum(1)
    centre = [
        float((side * (torch.arange(len(side)) + 0.5)).sum() / side.sum())
        for side in (columns, rows)
    ]
    size = [float(side.sum() / side.max()) for side in (columns, rows)]
    return [c - s / 2 for c, s in zip(centre, size, strict=True)] + [
        c + s / 2 for c, s in zip(centre, size, strict=True)
    ]


class OracleModel(nn.Module):
    """Stands for a network: scores the cell of the rectangle's centre, and knows its box."""

    def __init__(self, shape=SHAPE):
        super().__init__()
        self.shape = shape
        self.templates, self.masks, self.searches = [], [], []

    def remember(self, template, mask):
        self.templates.append(template)
        self.masks.append(mask)
        return torch.zeros(len(template), 1, 1)

    def locate(self, remembered, search):
        self.searches.append(search)
        side, grid = self.shape.search_px, self.shape.search_grid
        score = torch.full((len(search), grid, grid), -8.0)
        boxes = torch.rand(len(search), grid, grid, 4)
        for index, crop in enumerate(search):
            red = crop[0] * STD[0] + MEAN[0]
            red = red.where(red > 0.05, 0.0)  # the mean around the frame is a little red
            box = torch.tensor(where(red)) / side
            column, row = ((box[:2] + box[2:]) / 2 * grid).long().clamp(0, grid - 1).tolist()
            score[index, row, column], boxes[index, row, column] = 8.0, box
        return Prediction(score, boxes)


class Oracle:
    """A tracker that sees where the rectangle is in the whole frame."""

    name = "oracle"

    def init(self, image, box):
        checked_box(box, image)

    def track(self, image):
        x1, y1, x2, y2 = where(torch.from_numpy(image[..., 0] / 255.0))
        return Output(np.array([x1, y1, x2 - x1, y2 - y1]), 0.9)


def _covered(length, first, last):
    edges = np.arange(length)
    return np.clip(np.minimum(edges + 1, last) - np.maximum(edges, first), 0, 1)
