"""Small evaluations of made-up trackers, for the tests of reports and pictures."""

from pathlib import Path

import numpy as np

from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.scoring import Evaluation, score_tracker
from tasks.tracking.sequences.sequence import Sequence

FLAGS = {"easy": ("IV",), "middle": ("IV", "POC"), "hard": ("POC", "SV")}
"""Attributes of the three sequences."""
OFF = {"easy": 2.0, "middle": 8.0, "hard": 30.0}
"""Pixels by which a tracker of skill 1 is off after the first frame."""


def videos(frames: int = 10, benchmark: str = "lasot") -> list[Sequence]:
    """Three sequences of a box that moves to the right."""
    boxes = np.array([[50.0 + step, 60.0, 40.0, 40.0] for step in range(frames)])
    images = tuple(Path(f"{number:08d}.jpg") for number in range(1, frames + 1))
    return [
        Sequence(name, images, boxes, np.arange(frames) == frames - 1, 1, flags, benchmark)
        for name, flags in FLAGS.items()
    ]


def result(video: Sequence, skill: float = 1.0, seconds: float | None = 0.02) -> Result:
    """What a tracker of some skill says."""
    boxes = video.in_file(video.boxes)
    boxes[1:, 0] += OFF[video.name] / skill
    spent = None if seconds is None else np.full(len(boxes), seconds)
    return Result((boxes,), spent)


def evaluation(
    tracker: str = "ours",
    skill: float = 1.0,
    protocol: str = "pytracking",
    seconds: float | None = 0.02,
) -> Evaluation:
    """The scores of such a tracker."""
    every = videos()
    results = {video.name: result(video, skill, seconds) for video in every}
    return score_tracker(tracker, every, results, protocol)
