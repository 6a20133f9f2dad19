"""GOT-10k: average overlap and success rates of the frames that count."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.tracking.evaluation.got10k import pooled, visible_overlaps
from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.scoring import score_tracker
from tasks.tracking.sequences.sequence import Sequence
from visionlora.errors import DataError

SIZE = (200, 100)
BOX = [50.0, 50.0, 20.0, 20.0]


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_first_and_unseen_frames_do_not_count() -> None:
    truth = boxes(BOX, BOX, BOX, BOX)
    predicted = boxes([0, 0, 1, 1], BOX, [0, 0, 1, 1], BOX)
    absent = np.array([False, False, True, False])
    assert visible_overlaps(truth, predicted, SIZE, absent).tolist() == [1, 1]
    assert visible_overlaps(truth, predicted, SIZE).tolist() == [1, 0, 1]


def test_boxes_are_clipped_to_the_image() -> None:
    truth, predicted = boxes(BOX, [180, 80, 20, 20]), boxes(BOX, [180, 80, 400, 20])
    assert visible_overlaps(truth, predicted, SIZE).tolist() == [1.0]


def test_a_box_from_left_of_the_image_keeps_its_width() -> None:
    truth, predicted = boxes(BOX, [0, 0, 20, 20]), boxes(BOX, [-10, 0, 20, 20])
    assert visible_overlaps(truth, predicted, SIZE).tolist() == [1.0]


def test_inputs_stay_as_they_are() -> None:
    truth = boxes(BOX, [-5, -5, 500, 500])
    before = truth.copy()
    visible_overlaps(truth, truth, SIZE)
    assert np.array_equal(truth, before)


def test_frames_are_pooled_not_sequences() -> None:
    scores = pooled([np.ones(3), np.zeros(1)])
    assert scores.ao == 75.0
    assert (scores.sr50, scores.sr75) == (75.0, 75.0)


def test_success_is_strict() -> None:
    scores = pooled([np.array([0.5, 0.75, 0.76, 1.0])])
    assert scores.ao == pytest.approx(75.25)
    assert (scores.sr50, scores.sr75) == (75.0, 50.0)
    assert scores.curve.shape == (101,)
    assert scores.curve[100] == 0.0


def test_area_under_many_thresholds_approaches_average_overlap() -> None:
    overlaps = np.random.default_rng(0).uniform(size=5000)
    scores = pooled([overlaps])
    assert 100 * scores.curve.mean() == pytest.approx(scores.ao, abs=0.6)


def test_validation_sequences_are_scored_within_their_pictures(tmp_path: Path) -> None:
    frame = tmp_path / "00000001.jpg"
    Image.new("RGB", SIZE).save(frame)
    truth = boxes(BOX, [180, 80, 20, 20], BOX)
    video = Sequence(
        "GOT-10k_Val_000001",
        (frame, tmp_path / "2.jpg", tmp_path / "3.jpg"),
        truth,
        absent=np.array([False, False, True]),
        benchmark="got10k_val",
    )
    wide, far = truth.copy(), truth.copy()
    wide[1, 2:], far[1, 0] = 400, 0
    both = {video.name: Result((wide, far))}
    item = score_tracker("t", [video], both)
    assert item.got10k is not None
    assert (item.got10k.ao, item.got10k.sr50) == (50.0, 50.0)


def test_other_lengths_and_no_frames_are_refused() -> None:
    with pytest.raises(DataError, match="1 boxes for 2 annotated frames"):
        visible_overlaps(boxes(BOX, BOX), boxes(BOX), SIZE)
    with pytest.raises(DataError, match="no visible frame"):
        pooled([np.empty(0)])
