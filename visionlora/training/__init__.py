"""The training loop that all tasks share."""

from visionlora.training.loop import FitResult, fit
from visionlora.training.progress import Progress
from visionlora.training.rundir import RunDirectory
from visionlora.training.sampler import StepSampler, process, shard
from visionlora.training.schedules import constant, cosine
from visionlora.training.settings import TrainSettings

__all__ = [
    "FitResult",
    "Progress",
    "RunDirectory",
    "StepSampler",
    "TrainSettings",
    "constant",
    "cosine",
    "fit",
    "process",
    "shard",
]
