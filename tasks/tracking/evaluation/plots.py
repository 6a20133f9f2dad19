"""Success, precision and normalised precision curves, and AUC by attribute, as PNG.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; lines also differ
by their dashes. A tracker looks the same in all pictures, and legends are sorted by the figure they
show. The thin vertical line is where that figure is read. matplotlib draws without a display.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.tracking.evaluation.metrics import (
    AT_20,
    NORM_PRECISION_THRESHOLDS,
    PRECISION_THRESHOLDS,
    SUCCESS_THRESHOLDS,
)
from tasks.tracking.evaluation.scoring import Evaluation
from visionlora.errors import ConfigError
from visionlora.io.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
LEAST_AXES = 3
"""Attributes that a radar needs to be an area."""
INSIDE = 8
"""Trackers whose legend fits into the picture."""


def plot(evaluations: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Draw all pictures into `folder` and return their files."""
    pictures = {
        "success.png": _curves(
            evaluations,
            "success",
            SUCCESS_THRESHOLDS,
            "auc",
            ("Success", "overlap threshold", "frames with greater overlap (%)"),
        ),
        "precision.png": _curves(
            evaluations,
            "precision",
            PRECISION_THRESHOLDS,
            "precision",
            ("Precision", "centre error threshold (pixels)", "frames within (%)"),
        ),
        "norm_precision.png": _curves(
            evaluations,
            "norm_precision",
            NORM_PRECISION_THRESHOLDS,
            "norm_precision",
            ("Normalised precision", "normalised centre error threshold", "frames within (%)"),
        ),
    }
    if len(evaluations[0].by_attribute) >= LEAST_AXES:
        pictures["attributes.png"] = _radar(evaluations)
    return [
        write_atomically(folder / name, partial(_save, drawn)) for name, drawn in pictures.items()
    ]


def _curves(
    evaluations: Sequence[Evaluation],
    curve: str,
    thresholds: Any,
    figure: str,
    words: tuple[str, str, str],
) -> "Figure":
    title, x, y = words
    drawn = _figure(6.4, 4.8)
    axes = drawn.add_subplot()
    styles = _styles(evaluations)
    ranked = sorted(evaluations, key=lambda item: -getattr(item.mean, figure))
    for item in ranked:
        label = f"{item.tracker} [{getattr(item.mean, figure):.1f}]"
        values = 100 * getattr(item.mean.curves, curve)
        axes.plot(thresholds, values, label=label, linewidth=2, **styles[item.tracker])
    whole = ranked[0].protocol.norm_precision == "mean of curve"
    if figure == "precision" or (figure == "norm_precision" and not whole):
        axes.axvline(thresholds[AT_20], color="0.5", linewidth=0.8)
    axes.set(xlabel=x, ylabel=y, title=_title(title, ranked))
    axes.set(xlim=(0, thresholds[-1]), ylim=(0, 102))
    axes.grid(color="0.88")
    outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    axes.legend(fontsize=9, **(outside if len(ranked) > INSIDE else {"loc": "best"}))
    return drawn


def _radar(evaluations: Sequence[Evaluation]) -> "Figure":
    ranked = sorted(evaluations, key=lambda item: -item.mean.auc)
    styles = _styles(evaluations)
    names = list(ranked[0].by_attribute)
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    drawn = _figure(7.4, 6.0)
    axes: Any = drawn.add_subplot(projection="polar")
    axes.set(theta_offset=np.pi / 2, theta_direction=-1)
    around = np.append(angles, angles[0])
    greatest = 0.0
    for item in ranked:
        values = np.array([item.by_attribute[name].auc for name in names])
        greatest = max(greatest, float(values.max()))
        label = f"{item.tracker} [{item.mean.auc:.1f}]"
        closed = np.append(values, values[0])
        axes.plot(around, closed, label=label, linewidth=2, **styles[item.tracker])
    counts = ranked[0].by_attribute
    axes.set_xticks(angles, [f"{name}\n{counts[name].sequences}" for name in names])
    axes.set_ylim(0, 10 * np.ceil((greatest + 3) / 10))
    axes.set_rlabel_position(180 / len(names))
    axes.tick_params(axis="y", labelsize=8, labelcolor="0.4")
    axes.grid(color="0.88")
    axes.set_title(_title("AUC by attribute", ranked), pad=16)
    axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1.0), frameon=False)
    return drawn


def _title(what: str, ranked: Sequence[Evaluation]) -> str:
    first = ranked[0]
    count = len(first.sequences)
    return f"{what}: {first.benchmark}, {count} sequences, protocol {first.protocol.name}"


def _styles(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Return colour and dashes of every tracker, by its place in AUC; 28 pairs are different."""
    ranked = sorted(evaluations, key=lambda item: -item.mean.auc)
    return {
        item.tracker: {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place % len(DASHES)],
        }
        for place, item in enumerate(ranked)
    }


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'visionlora[tracking]'") from None
    return Figure(figsize=(width, height))


def _save(drawn: "Figure", path: Path) -> None:
    drawn.savefig(path, format="png", dpi=150, bbox_inches="tight")
