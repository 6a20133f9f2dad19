"""Samples and batches: functions of their number, whoever makes them; bad files; labels."""

import numpy as np
import pytest
import torch

from tasks.tracking.geometry.raster import cells
from tasks.tracking.images import read_image
from tasks.tracking.training.augment import Augmentation
from tasks.tracking.training.batches import Batches, collate
from tasks.tracking.training.data import load_source
from tasks.tracking.training.pairs import Pair, View
from tasks.tracking.training.samples import DRAWS, Samples
from tests.tasks.tracking.training_toy import SHAPE, write_data, write_sequence
from visionlora.errors import ConfigError, DataError


@pytest.fixture
def samples(tmp_path):
    source = load_source([write_data(tmp_path / "data")], ".", None, SHAPE)
    return Samples(source, SHAPE, 5, Augmentation())


class Marked:
    """A source of a white object on black, at the same place in both frames."""

    name, notes = "marked", ()

    def __init__(self, box):
        image = np.zeros((80, 90, 3), np.uint8)
        x1, y1, x2, y2 = box
        image[y1:y2, x1:x2] = 255
        self.view = View(image, np.array(box, float))

    def pair(self, rng):
        return Pair(self.view, self.view)


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_sample_depends_on_its_number_and_the_seed_alone(samples):
    forwards = [samples(number).row for number in range(4)]
    backwards = [samples(number).row for number in reversed(range(4))][::-1]
    assert all(map(equal, forwards, backwards))
    other = Samples(samples.source, SHAPE, 6, samples.augmentation)
    assert not any(map(equal, forwards, (other(number).row for number in range(4))))
    assert not equal(forwards[0], forwards[1])


def test_labels_are_the_cells_that_the_object_touches():
    samples = Samples(Marked((30, 20, 50, 36)), SHAPE, 0)
    for number in range(20):
        template, search, mask, truth, positive = samples(number).row
        # Bilinear edges are grey; half the brightness is where the object ends.
        white = search[0].numpy() > 127
        rows, columns = np.nonzero(white)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(truth.numpy() * SHAPE.search_px, seen, atol=1.01)
        np.testing.assert_array_equal(
            positive, cells(truth.double().numpy() * SHAPE.search_px, SHAPE.search_px, 4)
        )
        # The template shows twice the object, which fills the middle: all four cells.
        assert mask.dtype == torch.long
        assert mask.tolist() == [[1, 1], [1, 1]]
        assert template[:, 14, 14].tolist() == [255] * 3
        assert template[:, 1, 1].tolist() == [0] * 3


def test_the_search_is_jittered_and_the_template_is_not():
    samples = Samples(Marked((30, 20, 50, 36)), SHAPE, 0)
    rows = [samples(number).row for number in range(10)]
    assert all(torch.equal(row.template, rows[0].template) for row in rows)
    truths = torch.stack([row.truth for row in rows])
    assert (truths.std(dim=0) > 0.02).all()


def test_workers_give_the_same_bits_from_any_step_on(samples):
    alone = Batches(samples, 4)
    with_workers = Batches(samples, 4, workers=2)
    before = torch.get_rng_state()
    for step in (3, 4, 5, 0):
        assert equal(alone(step), with_workers(step))
    with_workers.close()
    assert torch.equal(before, torch.get_rng_state())


def test_every_step_has_samples_of_its_own_unless_they_are_fixed(samples):
    new = Batches(samples, 4)
    assert [new.numbers(step) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    fixed = Batches(samples, 4, fixed=6)
    drawn = [number for step in range(3) for number in fixed.numbers(step)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))


def test_processes_share_a_batch(samples, monkeypatch):
    whole = Batches(samples, 4).numbers(2)
    parts = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(Batches(samples, 4).numbers(2))
    assert sorted(parts[0] + parts[1]) == whole
    with pytest.raises(ConfigError, match="cannot be shared equally by 2 processes"):
        Batches(samples, 3).numbers(0)


def test_fixed_samples_are_made_once_and_new_ones_are_not_kept():
    class Counted(Marked):
        drawn = 0

        def pair(self, rng):
            Counted.drawn += 1
            return super().pair(rng)

    samples = Samples(Counted((30, 20, 50, 36)), SHAPE, 0)
    fixed, new = Batches(samples, 4, fixed=6), Batches(samples, 4)
    for step in range(6):
        fixed(step)
    assert Counted.drawn == 6
    for _ in range(2):
        new(0)
    assert Counted.drawn == 6 + 8


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_frames_are_counted_and_drawn_again(tmp_path, workers):
    write_sequence(tmp_path / "data" / "video")
    broken = tmp_path / "data" / "video" / "img" / "0002.png"
    source = load_source([f"folder:{tmp_path / 'data'}"], ".", None, SHAPE)
    broken.write_bytes(broken.read_bytes()[:40])
    batches = Batches(Samples(source, SHAPE, 0), 8, workers=workers)
    assert batches(0).search.shape == (8, 3, 56, 56)
    batches.close()
    ((reason, count),) = batches.unusable.items()
    assert str(broken) in reason
    # Two of six frames are drawn each time, so a third of the draws meets it: not none, not most.
    assert 1 <= count <= 12


def test_data_of_which_nothing_can_be_read_is_refused(tmp_path):
    write_sequence(tmp_path / "video")
    source = load_source([f"folder:{tmp_path}"], ".", None, SHAPE)
    for file in (tmp_path / "video" / "img").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=rf"{DRAWS} training pairs in a row .*no frame"):
        Samples(source, SHAPE, 0)(0)


def test_objects_that_no_crop_shows_enough_of_are_refused():
    with pytest.raises(DataError, match="too long and thin"):
        Samples(Marked((0, 40, 90, 41)), SHAPE, 0)(0)


@pytest.mark.data
def test_crops_of_real_frames_hold_their_objects(tracking_data):
    """Without jitter and colours, the crop around the true box is that part of the frame."""
    source = load_source([f"folder:{tracking_data}"], ".", None, SHAPE)
    assert source.notes == ("folder: 6 sequences",)
    batch = collate([Samples(source, SHAPE, 0, Augmentation())(number) for number in range(6)])
    assert batch.template.dtype == torch.uint8
    assert (batch.truth >= 0).all()
    assert (batch.truth <= 1).all()
    assert ((batch.truth[:, 2:] - batch.truth[:, :2]) * SHAPE.search_px > 9.9).all()
    assert batch.positive.flatten(1).any(dim=1).all()
    track = source.sources[0].sequences[0][0]
    assert read_image(track.frames[0]).shape[2] == 3
