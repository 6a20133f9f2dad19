"""Success, precision and normalised precision curves, and AUC by attribute, as PNG.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; lines also differ
by their dashes. Legends are sorted by the figure they show. matplotlib draws without a display.
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.tracking.evaluation.metrics import (
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
    if max(len(item.by_attribute) for item in evaluations) >= LEAST_AXES:
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
    ranked = sorted(evaluations, key=lambda item: -getattr(item.mean, figure))
    for item, (colour, dash) in zip(ranked, _styles(), strict=False):
        label = f"{item.tracker} [{getattr(item.mean, figure):.1f}]"
        values = 100 * getattr(item.mean.curves, curve)
        axes.plot(thresholds, values, color=colour, linestyle=dash, linewidth=2, label=label)
    axes.set(xlabel=x, ylabel=y, title=_title(title, ranked))
    axes.set(xlim=(0, thresholds[-1]), ylim=(0, 102))
    axes.grid(color="0.88")
    corner = "lower left" if curve == "success" else "lower right"
    _legend(axes, len(ranked), {"loc": corner})
    return drawn


def _radar(evaluations: Sequence[Evaluation]) -> "Figure":
    ranked = sorted(evaluations, key=lambda item: -item.mean.auc)
    names = list(dict.fromkeys(name for item in ranked for name in item.by_attribute))
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    drawn = _figure(7.4, 6.0)
    axes: Any = drawn.add_subplot(projection="polar")
    axes.set(theta_offset=np.pi / 2, theta_direction=-1)
    greatest = 0.0
    for item, (colour, dash) in zip(ranked, _styles(), strict=False):
        values = np.array([item.by_attribute[name].auc for name in names])
        greatest = max(greatest, float(values.max()))
        closed = np.append(values, values[0])
        label = f"{item.tracker} [{item.mean.auc:.1f}]"
        around = np.append(angles, angles[0])
        axes.plot(around, closed, color=colour, linestyle=dash, linewidth=2, label=label)
    counts = ranked[0].by_attribute
    axes.set_xticks(angles, [f"{name}\n{counts[name].sequences}" for name in names])
    axes.set_ylim(0, max(10.0, 10 * np.ceil(greatest / 10)))
    axes.set_rlabel_position(180 / len(names))
    axes.tick_params(axis="y", labelsize=8, labelcolor="0.4")
    axes.grid(color="0.88")
    axes.set_title(_title("AUC by attribute", ranked), pad=24)
    axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1.0), frameon=False)
    return drawn


def _title(what: str, ranked: Sequence[Evaluation]) -> str:
    first = ranked[0]
    count = len(first.sequences)
    return f"{what}: {first.benchmark}, {count} sequences, protocol {first.protocol.name}"


def _styles() -> Any:
    """Yield a colour and a dash pattern per tracker; the first dozens differ in one of them."""
    colours = cycle(COLOURS)
    for place in cycle(range(len(COLOURS) * len(DASHES))):
        shift = place // len(COLOURS)
        yield next(colours), DASHES[(place + shift) % len(DASHES)]


def _legend(axes: Any, count: int, inside: dict[str, Any]) -> None:
    outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    axes.legend(**(inside if count <= INSIDE else outside), fontsize=9, framealpha=0.9)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'visionlora[tracking]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(drawn: "Figure", path: Path) -> None:
    drawn.savefig(path, format="png", dpi=150, bbox_inches="tight")
