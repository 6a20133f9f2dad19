"""Several sequences at once: what ends, what fails, what is timed."""

import time

import numpy as np
import pytest

from tasks.tracking import runner
from tasks.tracking.images import read_image
from tasks.tracking.runner import Failure, OneByOne, Run, track_all
from tasks.tracking.sequences.sequence import Sequence
from tests.tasks.tracking.oracle import Oracle, sequence
from visionlora.errors import ConfigError


@pytest.fixture
def videos(tmp_path):
    return [sequence(tmp_path, f"v{index}", count, index) for index, count in enumerate((4, 1, 6))]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_frame_of_every_sequence_gets_its_box(videos, batch):
    told = []
    runs = list(track_all(Oracle(), videos, batch=batch, on_frames=lambda *step: told.append(step)))
    assert {run.sequence.name for run in runs} == {"v0", "v1", "v2"}
    for run in runs:
        np.testing.assert_allclose(run.boxes, run.sequence.boxes, atol=0.1)
        assert run.boxes[0].tolist() == run.sequence.boxes[0].tolist()
        assert (run.seconds > 0).all()
    assert sum(frames for frames, _ in told) == 11
    assert sum(seconds for _, seconds in told) == pytest.approx(
        sum(run.seconds.sum() for run in runs)
    )


def test_a_slot_that_ends_takes_the_next_sequence(videos):
    steps = []
    list(track_all(Oracle(), videos, batch=2, on_frames=lambda frames, _: steps.append(frames)))
    # v0 and v1 start; v1 is over at once, v2 starts; both advance; then v2 is alone.
    assert steps == [1, 1, 1, 2, 2, 2, 1, 1]


def test_a_damaged_frame_fails_its_sequence_alone(videos):
    videos[0].frames[2].write_bytes(b"not an image")
    videos[1].frames[0].unlink()
    found = {item.sequence.name: item for item in track_all(Oracle(), videos, batch=3)}
    assert isinstance(found["v2"], Run)
    assert isinstance(found["v0"], Failure)
    assert isinstance(found["v1"], Failure)
    assert "00000003.png" in str(found["v0"].error)
    assert "no frame" in str(found["v1"].error)


def test_a_first_box_outside_the_image_fails_its_sequence_alone(videos):
    bad = Sequence(name="bad", frames=videos[0].frames, boxes=videos[0].boxes + 500)
    found = list(track_all(Oracle(), [bad, *videos]))
    assert [type(item) for item in found] == [Failure, Run, Run, Run]
    assert "outside the image of 160 x 120" in str(found[0].error)


@pytest.mark.parametrize("ahead", [False, True])
def test_decoding_is_not_timed_as_tracking(videos, ahead, monkeypatch):
    def slow(path):
        time.sleep(0.03)
        return read_image(path)

    monkeypatch.setattr(runner, "read_image", slow)
    (run,) = track_all(Oracle(), videos[:1], ahead=ahead)
    assert run.seconds[1:].min() < 0.02


def test_copies_of_a_tracker_keep_their_own_state(videos):
    class Counting(Oracle):
        def init(self, image, box):
            self.count = 0

        def track(self, image):
            self.count += 1
            return super().track(image)

    lockstep = OneByOne(Counting())
    first, second = (read_image(video.frames[0]) for video in videos[::2])
    slots = [lockstep.start(first, (1, 1, 5, 5)), lockstep.start(second, (1, 1, 5, 5))]
    lockstep.advance(slots[:1], [first])
    lockstep.advance(slots, [first, second])
    assert [slot.count for slot in slots] == [2, 1]


def test_a_batch_of_no_sequence_is_refused(videos):
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        list(track_all(Oracle(), videos, batch=0))
