"""Calibration metrics against numbers worked out by hand, and their laws."""

import pytest
import torch

from visionlora.analysis import (
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    thresholded_calibration_error,
)
from visionlora.errors import ConfigError, DataError

# Confidences 0.9, 0.8, 0.6, 0.55; right, wrong, right, wrong.
PROBABILITIES = torch.tensor(
    [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.45, 0.55]], dtype=torch.float64
)
LABELS = torch.tensor([0, 0, 0, 0])

BINNED = [
    expected_calibration_error,
    classwise_calibration_error,
    maximum_calibration_error,
    adaptive_calibration_error,
    thresholded_calibration_error,
]


def close(value, expected):
    return value == pytest.approx(expected, abs=1e-12)


def test_ece_by_hand():
    # two bins: all four lie in (0.5, 1]: mean confidence 0.7125, accuracy 0.5
    assert close(expected_calibration_error(PROBABILITIES, LABELS, 2), 0.2125)
    # ten bins: (0.8, 0.9] holds 0.9, (0.7, 0.8] 0.8, (0.5, 0.6] the other two (mean 0.575, half)
    expected = (0.1 + 0.8 + 2 * 0.075) / 4
    assert close(expected_calibration_error(PROBABILITIES, LABELS, 10), expected)


def test_mce_by_hand():
    assert close(maximum_calibration_error(PROBABILITIES, LABELS, 10), 0.8)
    assert close(maximum_calibration_error(PROBABILITIES, LABELS, 1), 0.2125)


def test_classwise_ece_by_hand():
    # class 0 is always true: bins of 0.9 | 0.2 | 0.6 | 0.45, each alone; class 1 mirrors it
    one = (0.1 + 0.8 + 0.4 + 0.55) / 4
    assert close(classwise_calibration_error(PROBABILITIES, LABELS, 10), one)


def test_ace_by_hand():
    # two bins of two: (0.55, 0.6), half right, and (0.8, 0.9), half right
    expected = (abs(0.575 - 0.5) + abs(0.85 - 0.5)) / 2
    assert close(adaptive_calibration_error(PROBABILITIES, LABELS, 2), expected)
    # three bins of sizes 2, 1, 1
    expected = (2 * 0.075 + 0.8 + 0.1) / 4
    assert close(adaptive_calibration_error(PROBABILITIES, LABELS, 3), expected)


def test_thresholded_ace_by_hand():
    # of at least 0.5: 0.55 wrong, 0.6 right | 0.8 wrong, 0.9 right
    found = thresholded_calibration_error(PROBABILITIES, LABELS, 2, threshold=0.5)
    assert close(found, (0.075 + 0.35) / 2)
    # of at least 0.3, in one bin, also 0.4 wrong and 0.45 right: mean 0.61667, half right
    found = thresholded_calibration_error(PROBABILITIES, LABELS, 1, threshold=0.3)
    assert close(found, 3.7 / 6 - 0.5)
    assert thresholded_calibration_error(PROBABILITIES, LABELS, 2, threshold=2.0) == 0.0


def test_brier_by_hand():
    expected = 2 * (0.1**2 + 0.8**2 + 0.4**2 + 0.55**2) / 4
    assert close(brier_score(PROBABILITIES, LABELS), expected)
    assert close(brier_score(torch.eye(3), torch.tensor([0, 1, 2])), 0.0)
    assert close(brier_score(torch.eye(3), torch.tensor([1, 2, 0])), 2.0)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    probabilities = torch.tensor([[0.75, 0.25], [0.76, 0.24]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    apart = (0.25 + 0.76) / 2
    assert close(expected_calibration_error(probabilities, labels, 4), apart)


@pytest.mark.parametrize("metric", BINNED)
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_certain_and_right_is_perfect_and_certain_and_wrong_is_worst(metric, bins):
    labels = torch.arange(3).repeat(5)
    assert close(metric(torch.eye(3)[labels], labels, bins), 0.0)
    worst = metric(torch.eye(3)[labels], (labels + 1) % 3, bins)
    if metric is not classwise_calibration_error or bins > 1:
        expected = 2 / 3 if metric is classwise_calibration_error else 1.0
        assert close(worst, expected)


@pytest.mark.parametrize("metric", BINNED)
def test_the_order_of_samples_and_a_sharp_true_model_do_not_matter(metric):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(4000, 4, generator=generator).double().softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    order = torch.randperm(4000, generator=generator)
    value = metric(probabilities, labels, 10)
    assert close(metric(probabilities[order], labels[order], 10), value)
    if metric is not maximum_calibration_error:  # a bin of a few samples may be far off
        assert value < 0.05  # labels were drawn from the probabilities themselves
        assert metric(probabilities, (labels + 1) % 4, 10) > 2 * value


def test_equal_mass_with_fewer_samples_than_bins_takes_each_sample_alone():
    expected = (0.1 + 0.8 + 0.4 + 0.55) / 4
    assert close(adaptive_calibration_error(PROBABILITIES, LABELS, 15), expected)


def test_half_precision_and_graphs_are_taken():
    logits = torch.randn(8, 5, requires_grad=True)
    labels = torch.randint(0, 5, (8,))
    exact = expected_calibration_error(logits.softmax(1), labels)
    half = expected_calibration_error(logits.softmax(1).bfloat16(), labels)
    assert abs(exact - half) < 0.3


@pytest.mark.parametrize("metric", [*BINNED, brier_score])
def test_bad_input_is_refused(metric):
    for probabilities, labels in (
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)),
        (torch.randn(4, 2) * 5, LABELS),
        (PROBABILITIES, LABELS[:3]),
        (PROBABILITIES, LABELS + 2),
        (PROBABILITIES, LABELS - 1),
        (torch.full((4, 2), float("nan")), LABELS),
    ):
        with pytest.raises(DataError):
            metric(probabilities, labels)
    if metric is not brier_score:
        with pytest.raises(ConfigError, match="bins"):
            metric(PROBABILITIES, LABELS, 0)
