"""Patches: both halves from the same place, turned together, and a function of their number."""

import numpy as np
import pytest
import torch

from tasks.restoration.degradations.prod import Prod
from tasks.restoration.images import Picture, write_picture
from tasks.restoration.pairs.layouts import find_pairs
from tasks.restoration.pairs.samples import Batches, Samples
from tasks.restoration.pairs.sources import Pairs, cut, load_source
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


def test_workers_give_the_same_bits(tmp_path):
    write(tmp_path / "a.png", waves(0))
    samples = Samples(load_source(f"prod:{tmp_path}", prod=Prod(patch=16)), 16, seed=0)
    alone, helped = Batches(samples, 4), Batches(samples, 4, workers=2)
    for step in (3, 4, 0):
        for one, other in zip(alone(step), helped(step), strict=True):
            assert torch.equal(one, other)
    helped.close()


def test_processes_share_a_batch(tmp_path, monkeypatch):
    samples = Samples(load_source(str(write_pairs(tmp_path))), 8, seed=0)
    whole = Batches(samples, 4)(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert torch.equal(Batches(samples, 4)(1).input, whole.input[rank::2])


def test_what_does_not_fit_is_read_again_and_gives_the_same_patches(tmp_path):
    found = find_pairs(write_pairs(tmp_path, 3)).pairs
    picture = 40 * 48 * 3
    large, small = Pairs(found), Pairs(found, memory=4 * picture)
    assert large.notes == ("3 pairs",)
    assert large.read.held == 6 * picture
    assert small.read.held == 4 * picture
    assert "2 pictures do not fit" in small.notes[1]
    for number in range(6):
        patches = [source.patch(16, np.random.default_rng(number)) for source in (large, small)]
        np.testing.assert_array_equal(*patches)


def test_pictures_are_decoded_once(tmp_path):
    source = load_source(str(write_pairs(tmp_path, 2)))
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert source.patch(16, np.random.default_rng(0))[0].shape == (16, 16, 3)


def test_small_pictures_are_mirrored_out():
    levels = np.arange(4, dtype=np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    patch = cut(levels, (0, 0), 6) * 255
    assert patch.shape == (6, 6, 3)
    np.testing.assert_allclose(patch[0, :, 0], [0, 1, 2, 3, 3, 2], atol=1e-4)


def test_sixteen_bits_are_kept(tmp_path):
    shade = np.full((6, 6, 3), 1000 / 65535, np.float32)
    deep = Picture(np.zeros((1, 1, 3), np.uint16))
    for half in ("input", "target"):
        write_picture(tmp_path / half / "a.png", shade, deep)
    degraded, clean = load_source(str(tmp_path)).patch(4, np.random.default_rng(0))
    np.testing.assert_allclose(degraded, 1000 / 65535, rtol=1e-6)
    np.testing.assert_allclose(clean, 1000 / 65535, rtol=1e-6)


def test_every_task_makes_patches(tmp_path):
    write(tmp_path / "a.png", waves(0))
    for task in ("denoise", "derain", "dehaze", "deblur", "lowlight", "jpeg", "sr"):
        source = load_source(f"{task}:{tmp_path}")
        degraded, clean = source.patch(24, np.random.default_rng(0))
        assert degraded.shape == clean.shape == (24, 24, 3)
        assert degraded.dtype == np.float32
        # The convention of the papers: noise is added to what is stored and not cut off.
        assert bool(0 <= degraded.min() <= degraded.max() <= 1) is (task != "denoise")
        assert not np.array_equal(degraded, clean)
        assert task in source.notes[0]


def test_a_broken_picture_is_named(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "input" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        load_source(str(tmp_path))
    clean = load_source(f"prod:{tmp_path}")
    assert len(clean) == 3
    assert "1 pictures left out, first: " in clean.notes[1]
    assert "1.png cannot be read" in clean.notes[1]


def test_a_folder_of_nothing_but_broken_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"no clean picture; first: .*a\.png cannot be read"):
        load_source(f"derain:{tmp_path}")
