"""Success, precision and normalised precision: golden numbers, and the laws behind them."""

import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation.metrics import (
    PRECISION_THRESHOLDS,
    SUCCESS_THRESHOLDS,
    average,
    score_sequence,
    share_above,
    share_within,
)
from tasks.tracking.evaluation.protocols import PROTOCOLS
from visionlora.errors import DataError

Sequences = list[tuple[np.ndarray, np.ndarray]]
GOLDEN = {
    "pytracking": "pytracking",
    "stark": "ostrack_stark",
    "lasot": "lasot_matlab",
    "got10k": "got10k_toolkit",
}
GOLDEN_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def lasot(tracking_data: Path) -> Sequences:
    """Boxes and absence of the 280 test sequences, in the order of the toolkit's list."""
    archive = tracking_data / "lasot_annos" / "lasot_test_annos.tar.xz"
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as stored:
        files = {item.name: stored.extractfile(item).read().decode() for item in stored}  # type: ignore[union-attr]
    names = files["testing_set.txt"].split()
    return [
        (
            np.fromstring(files[f"annos/{name}.txt"].replace("\n", ","), sep=",").reshape(-1, 4),
            np.array(files[f"annos/absent/{name}.txt"].split()) == "1",
        )
        for name in names
    ]


def copy(truth: np.ndarray) -> np.ndarray:
    return truth.copy()


def static(truth: np.ndarray) -> np.ndarray:
    return np.tile(truth[0], (len(truth), 1))


def shift(truth: np.ndarray) -> np.ndarray:
    x, y, w, h = truth.T
    return np.stack([x + 0.15 * w, y - 0.10 * h, 1.05 * w, h], axis=1)


@pytest.mark.data
@pytest.mark.parametrize("tracker", [copy, static, shift])
def test_real_annotations_give_the_golden_numbers(
    lasot: Sequences, tracking_data: Path, tracker: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = tracking_data / "fixtures" / "lasot_golden_metrics.json"
    golden = json.loads(path.read_text())[tracker.__name__]
    predicted = [tracker(truth) for truth, _ in lasot]
    for boxes in predicted:
        boxes[:, 2:] = boxes[:, 2:].clip(min=1)
    assert len(lasot) == 280
    for protocol, entry in GOLDEN.items():
        scores = [
            score_sequence(truth, boxes, absent, protocol)
            for (truth, absent), boxes in zip(lasot, predicted, strict=True)
        ]
        mean, expected = average(scores), golden[entry]
        found = {
            "AUC": mean.auc,
            "P20": mean.precision,
            "NP20": 100 * mean.curves.norm_precision[20],
            "OP50": mean.op50,
            "OP75": mean.op75,
        }
        if protocol == "got10k":
            found["NP_mean_of_curve"] = mean.norm_precision
        else:
            assert mean.norm_precision == found["NP20"]
        assert found == pytest.approx(expected, abs=GOLDEN_TOLERANCE), protocol
        if protocol == "pytracking":
            first = list(golden["per_sequence_AUC_first3_pytracking"].values())
            assert [score.auc for score in scores[:3]] == pytest.approx(first, abs=1e-3)


def walk(frames: int = 50, seed: int = 0) -> np.ndarray:
    """A target that moves and grows, well inside the positive quadrant."""
    random = np.random.default_rng(seed)
    corner = 200 + random.normal(size=(frames, 2)).cumsum(axis=0)
    return np.concatenate([corner, random.uniform(20, 60, size=(frames, 2))], axis=1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truth_on_visible_data_scores_twenty_of_twenty_one(protocol: str) -> None:
    score = score_sequence(walk(), walk(), protocol=protocol)
    assert score.auc == pytest.approx(100 * 20 / 21)
    assert score.as_dict() == pytest.approx(
        {"auc": 95.238, "precision": 100, "norm_precision": 100, "op50": 100, "op75": 100},
        abs=1e-3,
    )


def test_success_is_strict_and_precision_is_not() -> None:
    truth = np.tile([100.0, 100.0, 40.0, 40.0], (2, 1))
    half, apart = truth.copy(), truth.copy()
    half[1, 2] = 20.0  # IoU is exactly .5
    apart[1, :2] += [12.0, 16.0]  # the centre is exactly 20 pixels away
    assert score_sequence(truth, half).op50 == 50.0
    assert score_sequence(truth, half).curves.success[9] == 1.0
    curve = score_sequence(truth, apart).curves.precision
    assert (curve[19], curve[20]) == (0.5, 1.0)


def test_curves_equal_direct_counts() -> None:
    values = np.append(np.random.default_rng(0).uniform(-1, 60, 500), [0.5, 20.0, np.inf])
    direct = [(values > threshold).mean() for threshold in SUCCESS_THRESHOLDS]
    assert share_above(values, SUCCESS_THRESHOLDS) == pytest.approx(direct)
    direct = [(values <= threshold).mean() for threshold in PRECISION_THRESHOLDS]
    assert share_within(values, PRECISION_THRESHOLDS) == pytest.approx(direct)


def test_nan_is_neither_a_success_nor_precise() -> None:
    nothing = np.array([np.nan])
    assert not share_above(nothing, SUCCESS_THRESHOLDS).any()
    assert not share_within(nothing, PRECISION_THRESHOLDS).any()


def test_normalised_error_is_in_units_of_the_annotated_size() -> None:
    truth = np.tile([100.0, 100.0, 50.0, 200.0], (2, 1))
    predicted = truth.copy()
    predicted[1, :2] += [0.3 * 50, 0.4 * 200]
    curve = score_sequence(truth, predicted).curves.norm_precision
    assert (curve[49], curve[50]) == (0.5, 1.0)


def test_first_box_is_replaced_by_the_annotation() -> None:
    predicted = walk()
    predicted[0] = [0, 0, 1, 1]
    assert score_sequence(walk(), predicted).auc == pytest.approx(2000 / 21)


def test_average_is_over_sequences_not_frames() -> None:
    short, long = walk(10), walk(90)
    lost = np.tile([900.0, 900.0, 5.0, 5.0], (90, 1))
    scores = [score_sequence(short, short), score_sequence(long, lost)]
    mean = average(scores)
    assert mean.op50 == pytest.approx((100 + 100 / 90) / 2)
    assert mean.auc == pytest.approx((scores[0].auc + scores[1].auc) / 2)
    assert mean.sequences == 2


def test_average_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no sequence"):
        average([])


def test_scores_do_not_change_their_inputs() -> None:
    truth, predicted = walk(), walk(seed=1)
    before = truth.copy(), predicted.copy()
    score_sequence(truth, predicted, np.ones(50, dtype=bool))
    assert np.array_equal(truth, before[0])
    assert np.array_equal(predicted, before[1])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"predicted boxes must be rows .* \(50, 3\)"):
        score_sequence(walk(), walk()[:, :3])
    with pytest.raises(DataError, match="49 flags of absence for 50"):
        score_sequence(walk(), walk(), np.zeros(49, dtype=bool))


def test_rounding_never_lifts_the_overlap_of_equal_boxes_above_one() -> None:
    truth = np.random.default_rng(0).uniform(0.1, 900.0, size=(2000, 4))
    assert score_sequence(truth, truth).curves.success[-1] == 0.0
