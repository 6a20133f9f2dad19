"""Reports: every figure once, the worst sequences first, the protocol beside all of it."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation.got10k import pooled
from tasks.tracking.evaluation.metrics import average
from tasks.tracking.evaluation.protocols import PROTOCOLS
from tasks.tracking.evaluation.report import (
    attribute_table,
    explanation,
    markdown,
    scores_json,
    sequences_csv,
    table,
    write_report,
)
from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.scoring import score_tracker
from tests.tasks.tracking.scored import FLAGS, evaluation, result, videos
from visionlora.errors import DataError


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table without its rule."""
    lines = [line for line in text.splitlines() if not line.startswith("|:")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_has_the_best_tracker_first_and_the_protocol_last() -> None:
    worse, better = evaluation("worse", 1.0, seconds=None), evaluation("better", 3.0)
    head, first, second = cells(table([worse, better]))
    assert head == [
        *("Tracker", "Dataset", "#seq", "AUC", "OP50", "OP75", "P", "P_norm"),
        *("AO", "FPS", "protocol"),
    ]
    mean = better.mean
    figures = [mean.auc, mean.op50, mean.op75, mean.precision, mean.norm_precision]
    expected = [f"{figure:.2f}" for figure in figures]
    assert first == ["better", "lasot", "3", *expected, "-", "50.00", "pytracking"]
    assert (second[0], second[-2]) == ("worse", "-")


def test_table_columns_line_up() -> None:
    lines = table([evaluation("a"), evaluation("a longer name")]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_got10k_adds_its_own_figures() -> None:
    item = replace(evaluation(), got10k=pooled([np.array([0.2, 0.6, 0.8, 1.0])]))
    head, row = cells(table([item]))
    figures = dict(zip(head, row, strict=True))
    assert (figures["AO"], figures["SR50"], figures["SR75"]) == ("65.00", "75.00", "50.00")


def test_attributes_average_the_sequences_that_have_them() -> None:
    item = evaluation()
    head, *rows = cells(attribute_table([item]))
    assert head == ["AUC (pytracking)", "#seq", "ours"]
    assert [row[0] for row in rows] == ["IV", "POC", "SV"]
    for name, count, auc in rows:
        scores = [item.sequences[key] for key, flags in FLAGS.items() if name in flags]
        assert int(count) == len(scores)
        assert float(auc) == pytest.approx(average(scores).auc, abs=0.005)


def test_csv_has_the_worst_sequence_first() -> None:
    rows = list(csv.DictReader(io.StringIO(sequences_csv([evaluation("a"), evaluation("b", 3)]))))
    assert [row["tracker"] for row in rows] == ["a"] * 3 + ["b"] * 3
    assert [row["sequence"] for row in rows[:3]] == ["hard", "middle", "easy"]
    assert {row["protocol"] for row in rows} == {"pytracking"}
    assert (rows[0]["frames"], rows[0]["absent"], rows[0]["fps"]) == ("10", "1", "50.00")


def test_json_holds_the_curves_from_which_figures_follow() -> None:
    item = evaluation()
    found = json.loads(scores_json([item]))
    entry = found["trackers"]["ours"]
    curves = entry["curves"]
    assert {name: len(curve) for name, curve in curves.items()} == {
        name: len(values) for name, values in found["thresholds"].items()
    }
    assert 100 * np.mean(curves["success"]) == pytest.approx(entry["auc"])
    assert 100 * curves["precision"][20] == pytest.approx(entry["precision"])
    assert found["thresholds"]["precision"][20] == 20
    assert entry["per_sequence"]["hard"]["auc"] == item.sequences["hard"].auc
    assert entry["attributes"]["IV"]["sequences"] == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_output_names_its_protocol(protocol: str) -> None:
    item = evaluation(protocol=protocol)
    text = markdown([item])
    assert text.count(protocol) >= 3
    assert protocol in explanation(item.protocol)
    assert json.loads(scores_json([item]))["protocol"] == protocol


def test_explanation_follows_the_protocol() -> None:
    assert "P_norm the mean of its curve" in explanation(PROTOCOLS["got10k"])
    assert "without the target count as failures" in explanation(PROTOCOLS["pytracking"])


def test_speed_is_all_frames_by_all_seconds() -> None:
    every = videos()
    spent = {"easy": 0.01, "middle": 0.03, "hard": None}
    results = {video.name: result(video, 1.0, spent[video.name]) for video in every}
    item = score_tracker("t", every, results)
    assert item.fps == pytest.approx(20 / 0.4)
    assert item.speed == pytest.approx({"easy": 100.0, "middle": 1 / 0.03})


def test_repetitions_are_averaged() -> None:
    every = videos()
    good, bad = (
        {video.name: result(video, skill).repeats[0] for video in every} for skill in (9.0, 0.5)
    )
    both = {name: Result((good[name], bad[name])) for name in good}
    single = [
        score_tracker("t", every, {name: Result((boxes,)) for name, boxes in half.items()})
        for half in (good, bad)
    ]
    assert score_tracker("t", every, both).mean.auc == pytest.approx(
        (single[0].mean.auc + single[1].mean.auc) / 2
    )


def test_errors_name_tracker_and_sequence() -> None:
    every = videos()
    results = {video.name: result(video) for video in every}
    results["middle"] = Result((results["middle"].repeats[0][:4],))
    with pytest.raises(DataError, match=r"^ours, sequence middle: 4 boxes for 10 annotated frames"):
        score_tracker("ours", every, results)


def test_hidden_truth_is_left_to_the_server() -> None:
    every = [replace(video, boxes=video.boxes[:1], absent=None) for video in videos()]
    results = {video.name: Result((np.ones((10, 4)),)) for video in every}
    with pytest.raises(DataError, match=r"server has to score it; --export"):
        score_tracker("ours", every, results)


def test_scores_do_not_depend_on_where_the_first_pixel_is() -> None:
    every = videos()
    moved = [replace(video, origin=0) for video in every]
    results = {video.name: result(video) for video in every}
    zero = {video.name: result(video) for video in moved}
    assert score_tracker("t", every, results).mean.auc == pytest.approx(
        score_tracker("t", moved, zero).mean.auc
    )


def test_report_writes_all_files(tmp_path: Path) -> None:
    written = write_report([evaluation()], tmp_path)
    assert sorted(path.name for path in written) == [
        *("attributes.png", "norm_precision.png", "precision.png", "report.md"),
        *("scores.json", "sequences.csv", "success.png"),
    ]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    plain = write_report([evaluation()], tmp_path / "plain", plots=False)
    assert [path.suffix for path in plain] == [".md", ".csv", ".json"]
