"""Pictures of results: the confusion matrix, and a grid of predicted images."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from visionlora.io.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TICKS = 40
"""Above this many classes the axes carry no names."""
MAX_COUNTS = 15
"""Up to this many classes the counts are written into the cells."""


def save_confusion(
    matrix: NDArray[np.int64], classes: Sequence[str], title: str, path: Path
) -> Path:
    """Draw counts by true (rows) and predicted (columns) class, coloured by share of the row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(14.0, max(4.5, 2.5 + 0.4 * len(classes)))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MAX_TICKS:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= MAX_COUNTS:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    return save_figure(figure, path)


def save_grid(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[str], path: Path, columns: int = 6
) -> Path:
    """Draw pictures `HxWx3` with a caption each."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.9 * columns, 2.3 * rows)
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for cell in cells:
        cell.axis("off")
    for cell, image, caption in zip(cells, images, captions, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set_title(caption, fontsize=8)
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, outside of any window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return write_atomically(path, lambda temporary: _write(temporary, buffer.getvalue()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
