"""Patches: both halves from the same place, turned together, and a function of their number."""

import numpy as np
import pytest
import torch

from tasks.restoration.degradations.prod import Prod
from tasks.restoration.pairs.samples import Batches, Samples
from tasks.restoration.pairs.sources import cut, load_source
from tests.tasks.restoration.pictures import waves, write, write_pairs
from visionlora.errors import DataError


@pytest.fixture
def equal_pairs(tmp_path):
    """Pairs whose halves are equal, so that they can be compared pixel by pixel."""
    for number in range(2):
        for half in ("input", "target"):
            write(tmp_path / half / f"{number}.png", waves(number))
    return load_source(str(tmp_path))


def test_both_halves_are_of_one_place_and_turned_together(equal_pairs):
    samples = Samples(equal_pairs, 16, seed=0)
    for number in range(12):
        degraded, clean = samples(number)
        assert degraded.shape == (16, 16, 3)
        np.testing.assert_array_equal(degraded, clean)


def test_patches_are_turned_all_eight_ways(tmp_path):
    corner = np.zeros((8, 8, 3), np.float32)
    corner[0, 1] = 1
    for half in ("input", "target"):
        write(tmp_path / half / "a.png", corner)
    samples = Samples(load_source(str(tmp_path)), 8, seed=0)
    places = {tuple(np.argwhere(samples(number)[1][..., 0])[0]) for number in range(80)}
    assert places == {(0, 1), (0, 6), (1, 0), (1, 7), (6, 0), (6, 7), (7, 1), (7, 6)}


def test_a_sample_depends_on_its_number_alone(tmp_path):
    write(tmp_path / "a.png", waves(0))
    write(tmp_path / "b.png", waves(1))
    source = load_source(f"prod:{tmp_path}", prod=Prod(patch=16))
    forwards = [Samples(source, 16, seed=3)(number) for number in range(6)]
    samples = Samples(source, 16, seed=3)
    backwards = [samples(number) for number in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert not np.array_equal(forwards[0][0], forwards[1][0])
    assert not np.array_equal(Samples(source, 16, seed=4)(0)[0], forwards[0][0])
    assert all(not np.array_equal(*pair) for pair in forwards)


def test_batches_are_samples_in_order(tmp_path):
    source = load_source(str(write_pairs(tmp_path)))
    samples = Samples(source, 16, seed=0)
    batch = Batches(samples, 4)(3)
    assert batch.input.shape == batch.target.shape == (4, 3, 16, 16)
    assert batch.input.dtype == torch.float32
    wanted = samples(13)[0].transpose(2, 0, 1)
    np.testing.assert_array_equal(batch.input[1].numpy(), wanted)
    assert 0 <= float(batch.input.min()) <= float(batch.input.max()) <= 1


def test_small_pictures_are_mirrored_out():
    levels = np.arange(4, dtype=np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    patch = cut(levels, (0, 0), 6) * 255
    assert patch.shape == (6, 6, 3)
    np.testing.assert_allclose(patch[0, :, 0], [0, 1, 2, 3, 3, 2], atol=1e-4)


def test_sixteen_bits_are_kept(tmp_path):
    levels = np.full((4, 4, 3), 1000, np.uint16)
    np.testing.assert_allclose(cut(levels, (0, 0), 4), 1000 / 65535, rtol=1e-6)


def test_every_task_makes_patches(tmp_path):
    write(tmp_path / "a.png", waves(0))
    for task in ("denoise", "derain", "dehaze", "deblur", "lowlight", "jpeg", "sr"):
        source = load_source(f"{task}:{tmp_path}")
        degraded, clean = source.patch(24, np.random.default_rng(0))
        assert degraded.shape == clean.shape == (24, 24, 3)
        assert 0 <= degraded.min() <= degraded.max() <= 1
        assert not np.array_equal(degraded, clean)
        assert task in source.notes[0]


def test_a_broken_picture_is_named(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "input" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        load_source(str(tmp_path))
