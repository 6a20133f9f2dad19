"""Scores of one tracker on a benchmark: every sequence, the mean, attributes, speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tasks.tracking.evaluation.got10k import Got10kScores, pooled, visible_overlaps
from tasks.tracking.evaluation.metrics import (
    Scores,
    SequenceScore,
    average,
    mean_curves,
    score_sequence,
)
from tasks.tracking.evaluation.protocols import Protocol, get_protocol
from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.sequences.frames import image_size
from tasks.tracking.sequences.lasot import ATTRIBUTES
from tasks.tracking.sequences.sequence import Sequence as Video
from visionlora.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """What there is to report about a tracker."""

    tracker: str
    benchmark: str
    protocol: Protocol
    sequences: dict[str, SequenceScore]
    attributes: dict[str, tuple[str, ...]]
    """Sequence -> what makes it difficult."""
    speed: dict[str, float]
    """Frames per second of the sequences whose seconds are known."""
    fps: float | None
    """Frames by the tracker's seconds, over all sequences."""
    got10k: Got10kScores | None = None
    """Only where the annotations are GOT-10k's."""

    @cached_property
    def mean(self) -> Scores:
        """Means over the sequences."""
        return average(list(self.sequences.values()))

    @cached_property
    def by_attribute(self) -> dict[str, Scores]:
        """Means over the sequences with each attribute, LaSOT's in the order of its paper."""
        there = {name for flags in self.attributes.values() for name in flags}
        names = [name for name in ATTRIBUTES if name in there]
        return {
            name: average(
                [score for key, score in self.sequences.items() if name in self.attributes[key]]
            )
            for name in names + sorted(there - set(names))
        }


def score_tracker(
    tracker: str,
    videos: Sequence[Video],
    results: Mapping[str, Result],
    protocol: str = "pytracking",
) -> Evaluation:
    """Score the results of all `videos`.

    Raises:
        DataError: truth is not public, or the protocol refuses boxes.
    """
    scores: dict[str, SequenceScore] = {}
    overlaps = []
    frames, seconds, speed = 0, 0.0, {}
    for video in videos:
        result = results[video.name]
        try:
            scores[video.name] = _score(video, result, protocol)
            if video.benchmark == "got10k_val":
                size = image_size(video.frames[0])
                overlaps += [
                    visible_overlaps(video.boxes, boxes, size, video.absent)
                    for boxes in result.repeats
                ]
        except DataError as error:
            raise DataError(f"{tracker}, sequence {video.name}: {error}") from error
        if result.seconds is not None and (spent := float(np.nansum(result.seconds))) > 0:
            speed[video.name] = result.seconds.size / spent
            frames, seconds = frames + result.seconds.size, seconds + spent
    return Evaluation(
        tracker,
        videos[0].benchmark,
        get_protocol(protocol),
        scores,
        {video.name: video.attributes for video in videos},
        speed,
        frames / seconds if seconds else None,
        pooled(overlaps) if overlaps else None,
    )


def _score(video: Video, result: Result, protocol: str) -> SequenceScore:
    """Score one sequence; of several repetitions, the mean."""
    if len(video.boxes) == 1 < len(video.frames):
        raise DataError(
            "only the first frame's annotation is public, so the benchmark's server has to score "
            "it; --export writes what it wants"
        )
    truth = video.in_file(video.boxes)
    scores = [
        score_sequence(truth, boxes, video.absent, protocol, video.benchmark)
        for boxes in result.repeats
    ]
    return replace(scores[0], curves=mean_curves(scores))
