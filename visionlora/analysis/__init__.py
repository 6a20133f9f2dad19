"""Measuring what a trained model does, and which of its weights it is due to."""

from visionlora.analysis.attribution import attribute, magnitude, sensitivity
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
    "attribute",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "magnitude",
    "maximum_calibration_error",
    "sensitivity",
    "thresholded_calibration_error",
]
