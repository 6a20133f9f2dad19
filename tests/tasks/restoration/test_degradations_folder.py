"""The degraded copy of a folder: pairs that fit, depth and grey that stay, nothing overwritten."""

import json

import cv2
import numpy as np
import pytest

from tasks.restoration.degradations.degrade import FACTS, DegradeConfig, run
from tasks.restoration.images import read_picture
from tasks.restoration.metrics import psnr
from tasks.restoration.pairs.layouts import find_pairs
from tests.tasks.restoration.pictures import waves, write
from visionlora.errors import DataError, OutputError


@pytest.fixture
def clean(tmp_path):
    for name in ("a.png", "b.jpg", "deeper/a.png"):
        write(tmp_path / "clean" / name, waves(len(name)))
    return tmp_path / "clean"


def degrade(clean, output, **options):
    return run(DegradeConfig(input=str(clean), output=str(output), **options))


def test_a_folder_is_copied_with_its_parameters(clean, tmp_path):
    out = tmp_path / "out"
    facts = degrade(clean, out, seed=3)
    assert facts == json.loads((out / FACTS).read_text())
    assert [(item["picture"], item["file"]) for item in facts["pictures"]] == [
        ("a.png", "a.png"),
        ("b.jpg", "b.png"),
        ("deeper/a.png", "deeper/a.png"),
    ]
    for item in facts["pictures"]:
        assert item["steps"]
        made, before = read_picture(out / item["file"]), read_picture(clean / item["picture"])
        assert made.size == before.size
        assert not np.array_equal(made.levels, before.levels)


def test_a_copy_follows_from_seed_and_name_alone(clean, tmp_path):
    degrade(clean, tmp_path / "whole")
    degrade(clean / "a.png", tmp_path / "alone")
    degrade(clean / "a.png", tmp_path / "other", seed=1)
    one, same, other = (
        (tmp_path / place / "a.png").read_bytes() for place in ("whole", "alone", "other")
    )
    assert one == same != other


def test_pairs_are_found_again(clean, tmp_path):
    out = tmp_path / "out"
    degrade(clean, out, task="dehaze", pairs=True)
    pairs = find_pairs(out).pairs
    assert len(pairs) == 3
    for pair in pairs:
        original = clean / pair.target.relative_to(out / "target")
        assert pair.target.read_bytes() == original.read_bytes()
        quality = psnr(read_picture(pair.input).levels, read_picture(pair.target).levels)
        assert 3 < quality < 30


def test_grey_pictures_stay_grey_and_get_the_whole_noise(tmp_path):
    grey = np.full((200, 200), 128, np.uint8)
    (tmp_path / "clean").mkdir()
    cv2.imwrite(str(tmp_path / "clean" / "grey.png"), grey)
    degrade(tmp_path / "clean", tmp_path / "out", task="denoise")
    made = read_picture(tmp_path / "out" / "grey.png")
    assert made.grey
    np.testing.assert_allclose((made.levels[..., 0] - 128.0).std(), 25, rtol=0.03)


def test_depth_and_transparency_stay(tmp_path):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 65536, (30, 20, 4), np.uint16)
    (tmp_path / "clean").mkdir()
    cv2.imwrite(str(tmp_path / "clean" / "deep.png"), stored)
    degrade(tmp_path / "clean", tmp_path / "out", task="deblur")
    again = cv2.imread(str(tmp_path / "out" / "deep.png"), cv2.IMREAD_UNCHANGED)
    assert again.dtype == np.uint16
    np.testing.assert_array_equal(again[..., 3], stored[..., 3])
    assert not np.array_equal(again[..., :3], stored[..., :3])


def test_a_broken_picture_does_not_stop_the_others(clean, tmp_path):
    (clean / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 3 pictures cannot be read.*b\.jpg.*2 are degraded"):
        degrade(clean, tmp_path / "out", task="jpeg")
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert [item["picture"] for item in facts["pictures"]] == ["a.png", "deeper/a.png"]
    assert (tmp_path / "out" / "deeper" / "a.png").is_file()


def test_a_folder_in_use_is_refused(clean, tmp_path):
    used = tmp_path / "used"
    write(used / "mine.png", waves(0))
    with pytest.raises(OutputError, match="not empty"):
        degrade(clean, used)
    with pytest.raises(OutputError, match="not empty"):
        degrade(clean, clean)
    with pytest.raises(OutputError, match="inside of the clean pictures"):
        degrade(clean, clean / "out")
    assert [path.name for path in used.iterdir()] == ["mine.png"]


def test_two_pictures_of_one_name_are_refused(clean, tmp_path):
    write(clean / "b.png", waves(7))
    with pytest.raises(DataError, match=r"b\.jpg and b\.png would both become"):
        degrade(clean, tmp_path / "out")
    assert not (tmp_path / "out").exists()
