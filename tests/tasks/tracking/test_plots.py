"""Pictures: curves are those of the scores, legends are sorted, everybody can tell lines apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation import plots
from tasks.tracking.evaluation.metrics import PRECISION_THRESHOLDS, SUCCESS_THRESHOLDS
from tests.tasks.tracking.scored import evaluation

WORDS = ("Success", "x", "y")


def test_curves_and_legend_are_the_scores() -> None:
    items = [evaluation("worse", 1.0), evaluation("better", 3.0)]
    drawn = plots._curves(items, "success", SUCCESS_THRESHOLDS, "auc", WORDS)
    axes = drawn.axes[0]
    lines = axes.get_lines()
    assert np.allclose(lines[0].get_ydata(), 100 * items[1].mean.curves.success)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [f"better [{items[1].mean.auc:.1f}]", f"worse [{items[0].mean.auc:.1f}]"]
    assert "protocol pytracking" in axes.get_title()
    assert axes.get_xlim() == (0, 1)


@pytest.mark.parametrize(
    ("protocol", "figure", "marked"),
    [
        ("pytracking", "auc", False),
        ("pytracking", "precision", True),
        ("pytracking", "norm_precision", True),
        ("got10k", "norm_precision", False),
    ],
)
def test_a_line_marks_where_the_figure_is_read(protocol: str, figure: str, marked: bool) -> None:
    items = [evaluation(protocol=protocol)]
    drawn = plots._curves(items, "precision", PRECISION_THRESHOLDS, figure, WORDS)
    others = drawn.axes[0].get_lines()[1:]
    assert [line.get_xdata()[0] for line in others] == [20.0] * marked


def test_a_tracker_looks_the_same_in_every_picture() -> None:
    items = [evaluation(name, skill) for name, skill in (("a", 1.0), ("b", 3.0), ("c", 9.0))]
    styles = plots._styles(items)
    assert styles["c"]["color"] == plots.COLOURS[0]
    for drawn in (
        plots._curves(items[::-1], "precision", PRECISION_THRESHOLDS, "precision", WORDS),
        plots._radar(items),
    ):
        for line, text in zip(
            drawn.axes[0].get_lines(), drawn.axes[0].get_legend().get_texts(), strict=False
        ):
            assert line.get_color() == styles[text.get_text()[0]]["color"]


def test_many_trackers_have_different_lines_and_a_legend_beside_the_picture() -> None:
    items = [replace(evaluation(), tracker=f"t{place}") for place in range(28)]
    looks = {tuple(style.values()) for style in plots._styles(items).values()}
    assert len(looks) == 28
    drawn = plots._curves(items, "success", SUCCESS_THRESHOLDS, "auc", WORDS)
    legend = drawn.axes[0].get_legend().get_bbox_to_anchor()
    assert legend.x0 > drawn.axes[0].bbox.x1


def test_radar_has_an_axis_per_attribute_and_closes() -> None:
    item = evaluation()
    axes = plots._radar([item]).axes[0]
    values = axes.get_lines()[0].get_ydata()
    assert len(values) == len(item.by_attribute) + 1
    assert values[0] == values[-1] == item.by_attribute["IV"].auc
    assert [text.get_text() for text in axes.get_xticklabels()] == ["IV\n2", "POC\n2", "SV\n1"]
    assert axes.get_ylim()[1] > values.max()


def test_files_are_png_and_radars_need_three_attributes(tmp_path: Path) -> None:
    flags = {"easy": ("IV",), "middle": ("POC",), "hard": ()}
    written = plots.plot([replace(evaluation(), attributes=flags)], tmp_path)
    assert [path.name for path in written] == ["success.png", "precision.png", "norm_precision.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
