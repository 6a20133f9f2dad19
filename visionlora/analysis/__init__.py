"""Measuring what a trained model does."""

from visionlora.analysis.calibration import (
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    thresholded_calibration_error,
)

__all__ = [
    "adaptive_calibration_error",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "maximum_calibration_error",
    "thresholded_calibration_error",
]
