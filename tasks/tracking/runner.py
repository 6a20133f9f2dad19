"""Run a tracker over sequences, several of them in lock step.

    for done in track_all(tracker, sequences, batch=8):
        ...                                     # a Run, or a Failure, as sequences end

`batch` sequences advance by one frame together; when one ends, the next takes its place. Boxes do
not depend on `batch`. A sequence with an unreadable frame fails alone, the others go on.

What is timed is the tracker, from the decoded frame to the box: reading and decoding images is
not. The time of a batch is shared equally by its frames.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tasks.tracking.images import Frame, read_image
from tasks.tracking.sequences.sequence import Sequence as Video
from tasks.tracking.trackers.base import LockstepTracker, Output, Tracker
from visionlora.errors import ConfigError, DataError

__all__ = ["Failure", "OneByOne", "Run", "track_all"]


@dataclass(frozen=True, eq=False)
class Run:
    """What a tracker said about one sequence."""

    sequence: Video
    boxes: Float[np.ndarray, "frames 4"]
    """x, y, w, h as `Sequence.boxes` counts them; the first is the one that was given."""
    seconds: Float[np.ndarray, " frames"]
    """Time of the tracker for every frame; for the first one that of its start."""


@dataclass(frozen=True, eq=False)
class Failure:
    """A sequence that could not be tracked to its end."""

    sequence: Video
    error: DataError


class OneByOne:
    """Lends a tracker without batches the interface of `LockstepTracker`.

    A slot is a shallow copy of the tracker: weights are shared, and what `init` and `track` assign
    belongs to the copy.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def start(self, image: Frame, box: ArrayLike) -> Tracker:
        """Return a copy of the tracker that follows the object in `box`."""
        slot = copy.copy(self.tracker)
        slot.init(image, box)
        return slot

    def advance(self, slots: Sequence[Any], images: Sequence[Frame]) -> list[Output]:
        """Let every copy track its next frame."""
        return [slot.track(image) for slot, image in zip(slots, images, strict=True)]


Told = Callable[[int, float], None] | None


class _Lane:
    """One sequence under way: its next frame, which is decoded on another thread, and results."""

    def __init__(self, sequence: Video, pool: ThreadPoolExecutor) -> None:
        self.sequence = sequence
        self.pool = pool
        self.boxes = np.empty((len(sequence), 4))
        self.seconds = np.empty(len(sequence))
        self.count = 0
        self.slot: object = None
        self.image: Frame | None = None  # the frame that is being tracked
        self._next: Future[Frame] | None = None

    @property
    def done(self) -> bool:
        return self.count == len(self.sequence)

    def request(self) -> None:
        """Begin to decode the frame after the last one that was taken, if there is one."""
        taken = self.count if self.image is None else self.count + 1
        if self._next is None and taken < len(self.sequence):
            self._next = self.pool.submit(read_image, self.sequence.frames[taken])

    def take(self) -> Frame:
        """Return the next frame, waiting for it."""
        self.request()
        assert self._next is not None
        pending, self._next = self._next, None
        self.image = pending.result()
        return self.image

    def add(self, box: ArrayLike, seconds: float) -> None:
        """Note the box of the frame that was taken."""
        self.boxes[self.count], self.seconds[self.count] = box, seconds
        self.count += 1
        self.image = None


def track_all(
    tracker: Tracker,
    sequences: Sequence[Video],
    *,
    batch: int = 1,
    ahead: bool = False,
    on_frames: Told = None,
) -> Iterator[Run | Failure]:
    """Yield the run of every sequence in the order in which they end.

    Args:
        tracker: Trackers that are no `LockstepTracker` take the frames of a step one by one.
        sequences: Videos, with at least the box of the first frame.
        batch: Sequences under way at a time.
        ahead: Decode the next frames while the tracker works. It saves time where the tracker runs
            on another device; on a CPU both would slow each other down and falsify the time.
        on_frames: Called after every step with the number of frames and the tracker's seconds.
    """
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    lockstep: Any = tracker if hasattr(tracker, "advance") else OneByOne(tracker)
    waiting = list(sequences)[::-1]
    lanes: list[_Lane] = []
    with ThreadPoolExecutor(max_workers=min(batch, 16)) as pool:
        try:
            while waiting or lanes:
                while waiting and len(lanes) < batch:
                    lane = _Lane(waiting.pop(), pool)
                    if failed := _started(lane, lockstep, on_frames):
                        yield failed
                    else:
                        lanes.append(lane)
                    yield from _finished(lanes)  # a video may have a single frame
                yield from _step(lanes, lockstep, ahead, on_frames)
                yield from _finished(lanes)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _started(lane: _Lane, tracker: LockstepTracker, told: Told) -> Failure | None:
    try:
        image = lane.take()
        began = time.perf_counter()
        lane.slot = tracker.start(image, lane.sequence.boxes[0])
    except DataError as error:
        return Failure(lane.sequence, error)
    seconds = time.perf_counter() - began
    lane.add(lane.sequence.boxes[0], seconds)
    if told is not None:
        told(1, seconds)
    return None


def _step(
    lanes: list[_Lane], tracker: LockstepTracker, ahead: bool, told: Told
) -> Iterator[Failure]:
    """Advance all lanes by one frame; lanes whose frame cannot be read are removed."""
    for lane in lanes:
        lane.request()  # all are decoded at once
    for lane in list(lanes):
        try:
            lane.take()
        except DataError as error:
            lanes.remove(lane)
            yield Failure(lane.sequence, error)
    if not lanes:
        return
    if ahead:
        for lane in lanes:
            lane.request()
    began = time.perf_counter()
    images = [lane.image for lane in lanes if lane.image is not None]
    outputs = tracker.advance([lane.slot for lane in lanes], images)
    seconds = time.perf_counter() - began
    for lane, output in zip(lanes, outputs, strict=True):
        lane.add(output.box, seconds / len(lanes))
    if told is not None:
        told(len(lanes), seconds)


def _finished(lanes: list[_Lane]) -> Iterator[Run]:
    """Remove and yield the lanes that have reached their end."""
    for lane in [lane for lane in lanes if lane.done]:
        lanes.remove(lane)
        yield Run(lane.sequence, lane.boxes, lane.seconds)
