"""Every cell of the table of conventions, on sequences of a few frames."""

import numpy as np
import pytest

from tasks.tracking.evaluation.metrics import SequenceScore, average, score_sequence
from tasks.tracking.evaluation.protocols import PROTOCOLS, get_protocol
from visionlora.errors import ConfigError, DataError

BOX = [100.0, 100.0, 40.0, 20.0]
FAR = [500.0, 500.0, 40.0, 20.0]
NONE = [np.nan] * 4
FLAGGED = ("pytracking", "lasot", "stark")
"""Protocols that read the flags of absent targets."""


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def right(score: SequenceScore) -> tuple[int, ...]:
    """How many frames count as right: by overlap, by distance, and by normalised distance."""
    percent = (score.op50, score.precision, 100 * score.curves.norm_precision[20])
    return tuple(round(share / 100 * score.frames) for share in percent)


@pytest.mark.parametrize("protocol", FLAGGED)
def test_absent_frames_are_failures_and_stay_in_the_denominator(protocol: str) -> None:
    truth = boxes(BOX, BOX, BOX, BOX)
    absent = np.array([False, False, True, False])
    score = score_sequence(truth, truth, absent, protocol)
    assert (score.frames, score.absent) == (4, 1)
    assert right(score) == (3, 3, 3)


def test_got10k_takes_absent_frames_as_ordinary_ones() -> None:
    truth = boxes(BOX, BOX)
    score = score_sequence(truth, truth, np.array([False, True]), "got10k")
    assert right(score) == (2, 2, 2)
    assert score.absent == 0


@pytest.mark.parametrize("protocol", FLAGGED)
def test_absent_wins_over_invalid(protocol: str) -> None:
    truth = boxes(BOX, [0, 0, 0, 0])
    score = score_sequence(truth, truth, np.array([False, True]), protocol)
    assert right(score) == (1, 1, 1)
    assert (score.absent, score.invalid) == (1, 0)


@pytest.mark.parametrize(
    ("protocol", "dataset", "expected"),
    [
        ("lasot", "lasot", (1, 2, 2)),
        ("pytracking", "lasot", (1, 1, 2)),
        ("pytracking", "uav123", (1, 2, 2)),
        ("stark", "lasot", (1, 1, 2)),
        ("stark", "uav123", (1, 2, 2)),
        ("got10k", "lasot", (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("invalid", [[1, 1, -1, -1], [10, 10, 0, 0], [10, 10, 5, -11]])
def test_visible_target_with_an_empty_annotation(
    protocol: str, dataset: str, expected: tuple[int, int, int], invalid: list[float]
) -> None:
    score = score_sequence(boxes(BOX, invalid), boxes(BOX, FAR), None, protocol, dataset)
    assert right(score) == expected
    assert score.invalid == (0 if protocol == "got10k" else 1)


@pytest.mark.parametrize("corner", [[0.0, 50.0], [50.0, 0.0], [-3.0, 50.0]])
def test_corner_outside_the_image_is_invalid_in_two_protocols(corner: list[float]) -> None:
    truth = boxes(BOX, [*corner, 40, 20])
    found = {name: right(score_sequence(truth, truth, None, name)) for name in PROTOCOLS}
    assert found["pytracking"] == (1, 1, 2)
    assert found["lasot"] == (1, 2, 2)
    assert found["stark"] == (2, 2, 2)
    assert found["got10k"] == (2, 2, 2)


@pytest.mark.parametrize(
    ("protocol", "frames", "expected"),
    [("pytracking", 2, (1, 2, 2)), ("lasot", 2, (1, 2, 2)), ("got10k", 1, (1, 1, 1))],
)
def test_missing_annotation_is_invalid_or_left_out(
    protocol: str, frames: int, expected: tuple[int, int, int]
) -> None:
    score = score_sequence(boxes(BOX, NONE), boxes(BOX, BOX), None, protocol, "uav123")
    assert score.frames == frames
    assert right(score) == expected


def test_got10k_normalises_by_sizes_of_at_least_one() -> None:
    truth, predicted = boxes(BOX, [100, 100, 0.1, 0.1]), boxes(BOX, [100.05, 100, 0.1, 0.1])
    assert right(score_sequence(truth, predicted, protocol="got10k"))[2] == 2
    assert right(score_sequence(truth, predicted, protocol="pytracking"))[2] == 1


@pytest.mark.parametrize("bad", [NONE, [100, np.nan, 40, 20], [100, 100, -1, 20]])
def test_nan_and_negative_predictions(bad: list[float]) -> None:
    truth, predicted = boxes(BOX, BOX, BOX), boxes(FAR, BOX, bad)
    copied = score_sequence(truth, predicted, protocol="lasot")
    assert right(copied) == (3, 3, 3)
    assert copied.copied == 1
    for protocol in ("pytracking", "stark"):
        with pytest.raises(DataError, match=r"box 3 is .* refuses nan and negative"):
            score_sequence(truth, predicted, protocol=protocol)
    kept = score_sequence(truth, predicted, protocol="got10k")
    assert right(kept)[0] == 2
    assert kept.copied == 0


def test_empty_prediction_copies_the_one_before() -> None:
    truth, predicted = boxes(BOX, BOX, BOX, BOX), boxes(FAR, BOX, [0, 0, 0, 0], [9, 9, 40, 0])
    for protocol in FLAGGED:
        score = score_sequence(truth, predicted, protocol=protocol)
        assert right(score) == (4, 4, 4)
        assert score.copied == 2
    assert right(score_sequence(truth, predicted, protocol="got10k")) == (2, 2, 2)


def test_the_first_prediction_is_copied_before_it_is_replaced() -> None:
    truth, predicted = boxes(BOX, BOX), boxes(FAR, [0, 0, 0, 0])
    assert right(score_sequence(truth, predicted, protocol="lasot")) == (1, 1, 1)


def test_bad_prediction_stays_where_the_annotation_is_missing() -> None:
    truth, predicted = boxes(BOX, BOX, NONE, BOX), boxes(BOX, BOX, [0, 0, 0, 0], [0, 0, 0, 0])
    score = score_sequence(truth, predicted, protocol="lasot")
    assert score.copied == 1
    assert right(score)[0] == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_surplus_predictions_are_cut(protocol: str) -> None:
    score = score_sequence(boxes(BOX, BOX), boxes(BOX, BOX, NONE), protocol=protocol)
    assert (score.frames, score.surplus) == (2, 1)
    assert right(score) == (2, 2, 2)


def test_missing_predictions() -> None:
    truth, predicted = boxes(BOX, BOX, BOX), boxes(BOX, BOX)
    for protocol in FLAGGED:
        with pytest.raises(DataError, match=rf"2 boxes for 3 .* '{protocol}' refuses on lasot"):
            score_sequence(truth, predicted, protocol=protocol, dataset="lasot")
    for protocol in ("pytracking", "stark"):
        padded = score_sequence(truth, predicted, protocol=protocol, dataset="otb")
        assert (padded.frames, padded.surplus) == (3, -1)
        assert right(padded) == (2, 2, 2)
    with pytest.raises(DataError, match="refuses on otb"):
        score_sequence(truth, predicted, protocol="lasot", dataset="otb")
    cut = score_sequence(truth, predicted, protocol="got10k")
    assert cut.frames == 2
    assert right(cut) == (2, 2, 2)


def test_normalised_precision_is_a_point_or_the_mean_of_the_curve() -> None:
    truth, predicted = boxes(BOX, BOX), boxes(BOX, [110, 100, 40, 20])  # a quarter of the width
    found = {name: score_sequence(truth, predicted, None, name) for name in PROTOCOLS}
    for protocol in FLAGGED:
        assert found[protocol].norm_precision == 50.0
    curve = found["got10k"].curves.norm_precision
    assert found["got10k"].norm_precision == pytest.approx(100 * curve.mean())
    assert curve.mean() == pytest.approx((25 * 0.5 + 26) / 51)


def test_lasot_leaves_sequences_without_a_success_out_of_the_mean() -> None:
    good, hidden = boxes(BOX, BOX), np.array([True, True])
    for protocol, auc, dropped in (("lasot", 2000 / 21, 1), ("pytracking", 1000 / 21, 0)):
        scores = [
            score_sequence(good, good, None, protocol),
            score_sequence(good, good, hidden, protocol),
        ]
        mean = average(scores)
        assert mean.auc == pytest.approx(auc)
        assert (mean.sequences, mean.dropped) == (2, dropped)


def test_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'pytraking' \(did you mean 'pytracking'\?\)"):
        get_protocol("pytraking")
