"""Pairs are found in the layouts that users have, and nothing is guessed."""

import numpy as np
import pytest

from tasks.restoration.images import read_picture
from tasks.restoration.metrics import psnr
from tasks.restoration.pairs.layouts import LAYOUTS, find_pairs, look
from tasks.restoration.pairs.sources import load_source, read_pair, split_spec
from tasks.restoration.pairs.split import split
from tests.tasks.restoration.pictures import waves, write
from visionlora.errors import ConfigError, DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


CASES = {
    "input-target": ("input/a.png", "target/a.jpg"),
    "lq-gt": ("train/lq/a.png", "train/gt/a.png"),
    "rain-norain": ("rain/rain-001.png", "norain/norain-001.png"),
    "low-high": ("our485/low/2.png", "our485/high/2.png"),
    "blur-sharp": ("GOPR0372_07_00/blur/000047.png", "GOPR0372_07_00/sharp/000047.png"),
    "hazy-clear": ("hazy/0001_0.8_0.2.jpg", "clear/0001.png"),
    "noisy-clean": ("Noisy/a_1.png", "Clean/a_1.png"),
    "rainy-gt": ("test/rainy/rain-1.png", "test/gt/norain-1.png"),
    "hazy-gt": ("hazy/01_outdoor_hazy.jpg", "GT/01_outdoor_GT.jpg"),
    "rain100": ("rainy/rain-001.png", "norain-001.png"),
    "sidd": ("0001_S6/0001_NOISY_SRGB_010.PNG", "0001_S6/0001_GT_SRGB_010.PNG"),
    "polyu": ("Canon_bar_real.JPG", "Canon_bar_mean.JPG"),
}


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_layout_is_recognised(layout, tmp_path):
    degraded, clean = CASES[layout]
    touch(tmp_path, degraded, clean)
    for asked in ("auto", layout):
        found = find_pairs(tmp_path, asked)
        assert found.layout == layout
        (pair,) = found.pairs
        assert (pair.input, pair.target) == (tmp_path / degraded, tmp_path / clean)


def test_equal_names_in_several_folders_stay_apart(tmp_path):
    touch(tmp_path, "a/blur/1.png", "a/sharp/1.png", "b/blur/1.png", "b/sharp/1.png")
    pairs = find_pairs(tmp_path).pairs
    assert [(p.input.parts[-3], p.target.parts[-3]) for p in pairs] == [("a", "a"), ("b", "b")]
    assert [p.name for p in pairs] == ["a/blur/1", "b/blur/1"]


def test_folders_inside_a_side_are_part_of_the_name(tmp_path):
    touch(tmp_path, "blur/000/1.png", "sharp/000/1.png", "blur/001/1.png", "sharp/001/1.png")
    assert [pair.name for pair in find_pairs(tmp_path).pairs] == ["blur/000/1", "blur/001/1"]
    assert all(p.input.parent.name == p.target.parent.name for p in find_pairs(tmp_path).pairs)


def test_equal_names_come_before_similar_ones(tmp_path):
    names = ("clean_1", "1", "1_2")
    touch(tmp_path, *(f"{side}/{name}.png" for side in ("noisy", "clean") for name in names))
    assert all(pair.input.name == pair.target.name for pair in find_pairs(tmp_path).pairs)


def test_many_degraded_pictures_may_share_a_clean_one(tmp_path):
    touch(tmp_path, "hazy/1_0.8_0.1.png", "hazy/1_0.9_0.2.png", "clear/1.png")
    assert {pair.target.name for pair in find_pairs(tmp_path).pairs} == {"1.png"}


def test_pictures_without_their_half_are_named(tmp_path):
    touch(tmp_path, "input/a.png", "input/b.png", "target/a.png", "target/c.png")
    with pytest.raises(DataError, match=r"no other half for input/b.png, target/c.png \(1 pairs"):
        find_pairs(tmp_path)


def test_all_pictures_are_accounted_for(tmp_path):
    touch(tmp_path, "input/a.png", "input/b.png", "target/a.png", "target/c.png", "sheet.png")
    found = look(tmp_path)
    assert [pair.name for pair in found.pairs] == ["input/a"]
    assert [path.name for path in found.alone] == ["b.png", "c.png"]
    assert [path.name for path in found.other] == ["sheet.png"]


def test_one_name_is_one_pair(tmp_path):
    touch(tmp_path, "input/a.png", "input/a.jpg", "target/a.png")
    with pytest.raises(DataError, match="the same degraded picture"):
        find_pairs(tmp_path)


def test_two_clean_halves_are_refused(tmp_path):
    touch(tmp_path, "input/a.png", "target/a.png", "target/a.jpg")
    with pytest.raises(DataError, match="clean half of the same picture"):
        find_pairs(tmp_path)


def test_what_is_no_layout_is_refused(tmp_path):
    touch(tmp_path, "pictures/a.png")
    with pytest.raises(DataError, match="input/ and target/ are enough"):
        find_pairs(tmp_path)
    with pytest.raises(DataError, match="in the layout lq-gt"):
        find_pairs(tmp_path, "lq-gt")
    with pytest.raises(ConfigError, match="did you mean 'polyu'"):
        find_pairs(tmp_path, "poly")


def test_halves_of_two_sizes_are_refused(tmp_path):
    write(tmp_path / "input/a.png", waves(0, 20, 30))
    write(tmp_path / "target/a.png", waves(0, 20, 31))
    with pytest.raises(DataError, match=r"a\.png is 30 x 20 and .*a\.png is 31 x 20"):
        load_source(str(tmp_path))


def test_specifications_are_read():
    assert split_spec("prod:photos") == ("prod", "photos")
    assert split_spec("data/PolyU") == ("pairs", "data/PolyU")
    assert split_spec("C:/data") == ("pairs", "C:/data")
    with pytest.raises(ConfigError, match="did you mean 'derain'"):
        split_spec("derian:photos")
    with pytest.raises(ConfigError, match="prod:FOLDER"):
        split_spec("prod:")


def test_parts_are_disjoint_and_nested():
    names = [f"{number:03}" for number in range(30)]
    large, small = (split(names, test=8, validation=4, train=train, seed=1) for train in (None, 5))
    assert sorted(large.train + large.validation + large.test) == list(range(30))
    assert large.test == small.test
    assert small.train == large.train[:5]
    assert split(names, test=8, validation=4, seed=2).test != large.test
    turned = split(names[::-1], test=8, validation=4, seed=1)
    assert {names[::-1][i] for i in turned.test} == {names[i] for i in large.test}
    with pytest.raises(DataError, match="30 pairs are too few for 20 to test"):
        split(names, test=20, validation=8, train=3)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "count", "wanted"),
    [("CC15", 8, 33.408), ("rain_pairs", 1, 25.966), ("haze_pairs", 1, 16.129)],
)
def test_real_pairs_have_the_ratio_they_are_known_for(restoration_data, folder, count, wanted):
    found = find_pairs(restoration_data / folder).pairs
    ratios = [psnr(*(half.in_8_bits for half in read_pair(pair))) for pair in found]
    assert len(ratios) == count
    assert np.mean(ratios) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.data
@pytest.mark.slow
def test_polyu_has_the_ratio_it_is_known_for(restoration_data):
    found = find_pairs(restoration_data / "PolyU").pairs
    halves = ((read_picture(p.input).levels, read_picture(p.target).levels) for p in found)
    assert np.mean([psnr(*pair) for pair in halves]) == pytest.approx(36.166, abs=1e-3)
    assert len(found) == 50
