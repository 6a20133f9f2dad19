"""The preview: its sheet holds exactly what was drawn; a draw follows from seed and name."""

import json

import numpy as np
import pytest

from tasks.restoration.degradations.preview import SHOWN, PreviewConfig, caption, run
from tasks.restoration.degradations.prod import Prod
from tasks.restoration.images import read_picture, to_levels
from tasks.restoration.sheet import GAP, sheet, wrapped
from tests.tasks.restoration.pictures import waves, write
from visionlora.errors import ConfigError, DataError

SIDE = 32
FACTOR = SHOWN // SIDE


@pytest.fixture
def clean(tmp_path):
    for number in range(3):
        write(tmp_path / "clean" / f"{number}.png", waves(number))
    return tmp_path / "clean"


def preview(clean, output, **options):
    options = {"pictures": 2, "draws": 2, "patch": SIDE, **options}
    return run(PreviewConfig(input=str(clean), output=str(output / "sheet.png"), **options))


def test_a_cell_is_the_patch_that_the_parameters_made(clean, tmp_path):
    config = PreviewConfig(input="", patch=SIDE, seed=5)
    facts = preview(clean, tmp_path, seed=5)
    drawn = read_picture(tmp_path / "sheet.png").levels
    patch = read_picture(clean / "0.png").pixels[4:36, 8:40]  # the middle of 40 x 48
    for column in range(2):
        made, steps = Prod("prod", patch=SIDE)(patch, config.generator("0.png", column))
        assert facts["pictures"][0]["draws"][column]["steps"] == steps["steps"]
        left = GAP + (column + 1) * (SHOWN + GAP)
        cell = drawn[GAP : GAP + SHOWN, left : left + SHOWN]
        expected = to_levels(made).repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)
        np.testing.assert_array_equal(cell, expected)


def test_the_json_is_what_was_drawn(clean, tmp_path):
    facts = preview(clean, tmp_path, mode="single", draws=4)
    assert json.loads((tmp_path / "sheet.json").read_text()) == facts
    assert [picture["picture"] for picture in facts["pictures"]] == ["0.png", "1.png"]
    assert {len(draw["steps"]) for item in facts["pictures"] for draw in item["draws"]} == {1}


def test_a_draw_follows_from_seed_and_name_alone(clean, tmp_path):
    whole = preview(clean, tmp_path)
    alone = preview(clean / "1.png", tmp_path)
    other = preview(clean, tmp_path, seed=1)
    assert alone["pictures"][0] == whole["pictures"][1]
    draws = [
        [step for item in facts["pictures"] for step in item["draws"]] for facts in (whole, other)
    ]
    assert draws[0] != draws[1]
    assert draws[0][0] != draws[0][1]


def test_a_broken_picture_is_passed_over(clean, tmp_path, capsys):
    (clean / "0.png").write_text("no picture")
    facts = preview(clean, tmp_path, task="denoise")
    assert [picture["picture"] for picture in facts["pictures"]] == ["1.png", "2.png"]
    assert "0.png cannot be read" in capsys.readouterr().err
    with pytest.raises(DataError, match="no picture in"):
        preview(clean / "0.png", tmp_path)


def test_pictures_below_the_size_of_a_patch_are_mirrored_out(clean, tmp_path):
    preview(clean, tmp_path, patch=64, pictures=1, draws=1, task="jpeg")
    side = -(-SHOWN // 64) * 64
    width = read_picture(tmp_path / "sheet.png").size[1]
    assert width == 2 * side + 3 * GAP


def test_the_noise_of_the_task_has_its_published_strength(restoration_data, tmp_path):
    """20 log10(255 / 25) = 20.17 dB, a little more since stored values are clamped."""
    facts = preview(
        restoration_data / "Kodak24", tmp_path, task="denoise", patch=256, pictures=2, draws=1
    )
    for picture in facts["pictures"]:
        assert 20.1 < picture["draws"][0]["psnr"] < 21.2


def test_captions_say_functions_in_order_with_units():
    steps = [
        {"function": "motion", "length": 12.345, "angle": 30.0, "walk": True},
        {"function": "noise", "kind": "poisson", "photons": 2032.05, "grey": False},
        {"function": "blur", "sigma": [0.51, 2.0]},
    ]
    assert caption({"steps": steps}).splitlines() == [
        "motion length 12.3 px angle 30° walk",
        "noise poisson photons 2032",
        "blur sigma 0.51/2",
    ]
    assert caption({"steps": []}) == "clean"
    assert caption({"sigma": 25.0}) == "sigma 25"


def test_a_sheet_keeps_pixels_and_makes_room_for_captions():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (20, 90, 3), np.uint8) for _ in range(3)]
    made = sheet([[(pictures[0], "one"), (pictures[1], "two\nlines")], [(pictures[2], "")]])
    assert made.shape[1] == 2 * 90 + 3 * GAP
    np.testing.assert_array_equal(made[GAP : GAP + 20, GAP : GAP + 90], pictures[0])
    np.testing.assert_array_equal(made[GAP : GAP + 20, 2 * GAP + 90 : -GAP], pictures[1])
    rows = np.flatnonzero((made[:, GAP] == pictures[2][0, 0]).all(axis=1))
    assert (made[rows[-1], GAP : GAP + 90] == pictures[2][0]).all()


def test_long_captions_are_broken_between_words():
    class Fixed:
        def getlength(self, text):
            return len(text)

    lines = wrapped("aaa bbb ccc\n\nddddddddddddd", 8, Fixed())
    assert lines == ["aaa bbb", "    ccc", "", "ddddddddddddd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "dehase"}, "unknown task 'dehase'.*did you mean 'dehaze'"),
        ({"task": "denoise", "mode": "prod"}, "give one"),
        ({"identity": 2.0}, "identity share"),
        ({"patch": 0}, "--patch must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"draws": 0}, "--draws must be at least 1"),
        ({"output": "sheet.jpg"}, r"a sheet \*\.png"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        PreviewConfig(input="clean", **options)
