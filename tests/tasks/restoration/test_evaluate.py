"""Figures of a folder of pairs: those of the parts, and what is wrong with the folder is said."""

import csv
import json
import math

import numpy as np
import pytest

import visionlora as vl
from tasks.restoration.evaluate import EvaluateConfig, run
from tasks.restoration.figures import mean
from tasks.restoration.images import Picture, read_picture, to_levels, write_levels
from tasks.restoration.inference.restorer import Restorer, RestorerConfig
from tasks.restoration.metrics import psnr, ssim
from tasks.restoration.networks.files import load_base
from tasks.restoration.pictures import SIDE, Extremes, difference, shown, worst_place
from tasks.restoration.training.adapter_folder import load_adapter
from tests.tasks.restoration.pictures import waves, write, write_pairs
from tests.tasks.restoration.small_networks import write_adapter, write_base
from visionlora.errors import AdapterFileError, ConfigError, DataError, OutputError

CONTRACT = (
    *("task", "base", "method", "data", "images", "psnr", "ssim", "psnr_input", "ssim_input"),
    *("trainable_parameters", "trainable_percent", "adapter_bytes", "seconds_per_megapixel"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "same.safetensors")


def evaluated(root, base, folder, **options):
    defaults = {"task": "denoise", "device": "cpu", "rows": 0, "lpips": False}
    given = {**defaults, "data": str(root), "base": str(base), "output": str(folder), **options}
    return run(EvaluateConfig(**given))


def table(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def halves(root, name):
    return [read_picture(root / side / f"{name}.png").levels for side in ("input", "target")]


def test_a_network_that_does_nothing_has_the_figures_of_the_input(root, identity, tmp_path):
    result = evaluated(root, identity, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert all(result[key] is not None for key in CONTRACT)
    pairs = [halves(root, number) for number in range(4)]
    assert result["images"] == 4
    assert result["psnr"] == result["psnr_input"]
    assert result["psnr"] == pytest.approx(np.mean([psnr(*pair) for pair in pairs]), abs=1e-4)
    assert result["ssim"] == pytest.approx(np.mean([ssim(*pair) for pair in pairs]), abs=1e-4)
    assert result["psnr_y"] == pytest.approx(np.mean([psnr(*p, "y") for p in pairs]), abs=1e-4)
    assert (result["method"], result["adapter_bytes"], result["trainable_percent"]) == (
        "none",
        0,
        0,
    )
    assert result["worse"] == 0
    assert result["failed"] == {}
    rows = table(tmp_path)
    assert [row["picture"] for row in rows] == [f"input/{number}" for number in range(4)]
    assert float(rows[2]["psnr_rgb"]) == pytest.approx(psnr(*pairs[2]), abs=1e-4)
    assert {float(row["gain_rgb"]) for row in rows} == {0.0}


def test_channel_and_border_choose_the_headline(root, identity, tmp_path):
    result = evaluated(root, identity, tmp_path, channel="y", crop=4)
    wanted = np.mean([psnr(*halves(root, number), "y", 4) for number in range(4)])
    assert result["psnr"] == result["psnr_y"] == pytest.approx(wanted, abs=1e-4)
    assert (result["channel"], result["crop"]) == ("y", 4)


def test_an_adapter_is_used_and_its_cost_is_told(root, identity, tmp_path):
    folder = write_adapter(tmp_path / "adapter", identity, brighter=0.1)
    result = evaluated(root, identity, tmp_path / "out", adapter=str(folder), save=True)
    loaded = load_base(identity)
    card = load_adapter(loaded, folder)
    assert result["method"] == "colora"
    assert result["trainable_parameters"] == card.trainable
    assert result["trainable_percent"] == pytest.approx(card.percent, abs=1e-4)
    assert result["adapter_bytes"] == (folder / "adapter.safetensors").stat().st_size
    given, target = halves(root, 0)
    brighter = to_levels(given.astype(np.float32) / 255 + 0.1)
    assert float(table(tmp_path / "out")[0]["psnr_rgb"]) == pytest.approx(
        psnr(brighter, target), abs=0.01
    )
    saved = read_picture(tmp_path / "out" / "restored" / "input" / "0.png").levels
    assert psnr(saved, target) == pytest.approx(
        float(table(tmp_path / "out")[0]["psnr_rgb"]), abs=1e-4
    )


def test_the_adapter_is_folded_and_the_picture_stays(identity, tmp_path):
    folder = write_adapter(tmp_path / "adapter", identity)
    config = RestorerConfig(base=str(identity), adapter=str(folder), device="cpu")
    restorer, pixels = Restorer(config), waves(0)
    folded = restorer(pixels)
    vl.unmerge(restorer.base.model)  # would refuse if it were not
    assert np.abs(restorer(pixels) - folded).max() < 1e-5


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(root, identity, tmp_path):
    other = write_base(tmp_path / "other.safetensors", change=1)
    folder = write_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterFileError, match=r"adapter of other.safetensors.*not of same"):
        evaluated(root, identity, tmp_path / "out", adapter=str(folder))
    assert not (tmp_path / "out").exists()


def test_output_that_is_worse_than_the_input_is_said_aloud(root, identity, tmp_path, capsys):
    folder = write_adapter(tmp_path / "adapter", identity, brighter=0.3)
    result = evaluated(root, identity, tmp_path / "out", adapter=str(folder))
    assert result["worse"] == 4
    loss = result["psnr_input"] - result["psnr"]
    assert f"warning: the pictures are worse than they were, by {loss:.2f} dB" in (
        capsys.readouterr().out
    )


def test_broken_pairs_are_named_and_the_others_are_measured(identity, tmp_path, capsys):
    root = write_pairs(tmp_path / "pairs")
    (root / "input" / "1.png").write_bytes((root / "input" / "1.png").read_bytes()[:500])
    write(root / "target" / "2.png", waves(2, 41, 48))
    with pytest.raises(DataError, match=r"2 of 4 pairs .*1\.png.* of the other 2"):
        evaluated(root, identity, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["images"] == 2
    assert set(result["failed"]) == {"input/1", "input/2"}
    assert "48 x 41" in capsys.readouterr().err
    assert [row["picture"] for row in table(tmp_path / "out")] == ["input/0", "input/3"]


def test_nothing_that_can_be_measured_leaves_no_folder(identity, tmp_path):
    root = write_pairs(tmp_path / "pairs", 1)
    (root / "input" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no pair can be measured.*0\.png"):
        evaluated(root, identity, tmp_path / "a" / "out")
    # What the folder was claimed with is gone too.
    assert not (tmp_path / "a").exists()


def test_exact_pictures_are_infinite_and_not_in_the_mean(identity, tmp_path, capsys):
    root = write_pairs(tmp_path / "pairs", 3)
    write(root / "input" / "1.png", waves(1))
    result = evaluated(root, identity, tmp_path / "out")
    wanted = np.mean([psnr(*halves(root, number)) for number in (0, 2)])
    assert result["psnr"] == pytest.approx(wanted, abs=1e-4)
    assert result["exact"] == 1
    row = table(tmp_path / "out")[1]
    assert (row["psnr_rgb"], row["gain_rgb"]) == ("inf", "0.0000")
    assert "1 restored pictures equal their target" in capsys.readouterr().out
    assert mean([math.inf]).value is None


def test_every_kind_of_picture_is_measured(identity, tmp_path):
    root = tmp_path / "pairs"
    clean = waves(0, 33, 47)
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape), 0, 1)
    alpha = np.full((33, 47), 200, np.uint8)
    kinds = {
        "grey": Picture(to_levels(clean), grey=True),
        "alpha": Picture(to_levels(clean), alpha),
        "deep": Picture(to_levels(clean, np.uint16)),
    }
    for name, like in kinds.items():
        for side, pixels in (("input", noisy), ("target", clean)):
            write_levels(root / side / f"{name}.png", to_levels(pixels, like.levels.dtype), like)
    result = evaluated(root, identity, tmp_path / "out", tile=16, overlap=4)
    rows = {row["picture"]: float(row["psnr_rgb"]) for row in table(tmp_path / "out")}
    assert result["images"] == 3
    plain = psnr(to_levels(noisy), to_levels(clean))
    assert rows["input/alpha"] == rows["input/deep"] == pytest.approx(plain, abs=1e-4)
    grey = [to_levels(part).mean(axis=2, keepdims=True).repeat(3, 2) for part in (noisy, clean)]
    assert rows["input/grey"] == pytest.approx(
        psnr(*(np.rint(part).astype(np.uint8) for part in grey)), abs=1e-4
    )


def test_a_grey_picture_is_measured_without_colours(identity, tmp_path):
    base = write_base(tmp_path / "base.safetensors", change=1)
    root = tmp_path / "pairs"
    for side in ("input", "target"):
        write_levels(root / side / "a.png", to_levels(waves(0)), Picture(waves(0), grey=True))
    evaluated(root, base, tmp_path / "out", save=True)
    saved = read_picture(tmp_path / "out" / "restored" / "input" / "a.png")
    assert saved.grey
    clean = read_picture(root / "target" / "a.png").levels
    assert float(table(tmp_path / "out")[0]["psnr_rgb"]) == pytest.approx(
        psnr(saved.levels, clean), abs=1e-4
    )


def test_clean_pictures_are_degraded_in_the_same_way_every_time(root, identity, tmp_path):
    options = {"task": None, "data": f"denoise:{root / 'target'}"}
    one, other = (evaluated(root, identity, tmp_path / name, **options) for name in "ab")
    assert one["task"] == "denoise"
    assert one["psnr"] == other["psnr"]
    # Noise of 25 levels, but for what is clamped at black and white.
    assert 20.1 < one["psnr"] < 21.5
    third = evaluated(root, identity, tmp_path / "c", **options, seed=1)
    assert third["psnr"] != one["psnr"]


def test_pictures_of_the_training_can_be_left_out(root, identity, tmp_path, capsys):
    parts = {"train": ["input/0"], "validation": ["input/1"], "test": ["input/3"]}
    folder = str(write_adapter(tmp_path / "adapter", identity, parts=parts))
    evaluated(root, identity, tmp_path / "all", adapter=folder)
    assert "2 of 4 pictures have names of pictures that the adapter" in capsys.readouterr().out
    evaluated(root, identity, tmp_path / "test", adapter=folder, part="test")
    assert [row["picture"] for row in table(tmp_path / "test")] == ["input/3"]
    del parts["test"]
    folder = str(write_adapter(tmp_path / "other", identity, parts=parts))
    evaluated(root, identity, tmp_path / "rest", adapter=folder, part="test")
    assert [row["picture"] for row in table(tmp_path / "rest")] == ["input/2", "input/3"]


def test_lpips_is_said_to_be_missing_with_the_way_to_get_it(
    root, identity, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = evaluated(root, identity, tmp_path / "out", lpips=True)
    assert "lpips" not in result
    said = capsys.readouterr().out
    assert "alexnet-owt-7be5be79.pth into" in said
    assert str(tmp_path) in said


def test_a_folder_with_results_is_not_replaced_unasked(root, identity, tmp_path):
    evaluated(root, identity, tmp_path)
    with pytest.raises(OutputError, match="already holds a finished run"):
        evaluated(root, identity, tmp_path)
    evaluated(root, identity, tmp_path, overwrite=True, crop=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": -1}, "--crop must not be negative"),
        ({"task": " "}, "--task must not be empty"),
        ({"task": None}, "--task is missing"),
        ({"part": "test"}, "needs --adapter"),
        ({"tile": 16, "overlap": 16}, "--overlap must lie"),
        ({"layout": "sid"}, "did you mean 'sidd'"),
        ({"base": "nowhere.pth"}, "no base network 'nowhere.pth'"),
    ],
)
def test_options_that_make_no_sense_are_refused(root, identity, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(root, options.pop("base", identity), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sheets_show_what_lost_and_what_gained_most(identity, tmp_path):
    root = write_pairs(tmp_path / "pairs", 3)
    for number, brightness in enumerate((0.0, -0.1, -0.3)):
        write(root / "input" / f"{number}.png", waves(number) + brightness)
    folder = write_adapter(tmp_path / "adapter", identity, brighter=0.1)
    evaluated(root, identity, tmp_path / "out", adapter=str(folder), rows=1)
    gains = [float(row["gain_rgb"]) for row in table(tmp_path / "out")]
    assert gains[0] == -math.inf
    assert gains[1] == max(gains)
    sheets = {name: read_picture(tmp_path / "out" / f"{name}.png").levels for name in EXTREMES}
    first = read_picture(root / "input" / "0.png").levels
    factor = SIDE // 48
    for name, number in EXTREMES.items():
        wanted = read_picture(root / "input" / f"{number}.png").levels
        wanted = wanted.repeat(factor, 0).repeat(factor, 1)
        assert np.array_equal(sheets[name][6 : 6 + len(wanted), 6 : 6 + wanted.shape[1]], wanted)
    assert first.shape == (40, 48, 3)


EXTREMES = {"worst": 0, "best": 1}


def test_only_extremes_are_kept():
    from tasks.restoration.figures import Measured

    extremes, order = Extremes(2, "rgb"), [5, 1, 9, 3, 7, 2, 8]
    cell = shown("x", *(np.zeros((8, 8, 3), np.uint8),) * 3)
    for gain in order:
        before, after = ({"psnr_rgb": 20.0 + value} for value in (0, gain))
        extremes.add(Measured(str(gain), (8, 8), before, after, 1.0), cell)
    assert [item.name for item, _ in extremes._kept] == ["1", "2", "8", "9"]


def test_a_large_picture_is_cut_to_its_worst_place():
    clean = np.full((400, 500, 3), 90, np.uint8)
    damaged = clean.copy()
    damaged[300:340, 400:420] = 200
    top, left = worst_place(damaged, clean)
    assert top <= 300
    assert top + SIDE >= 340
    assert left <= 400
    assert left + SIDE >= 420
    item = shown("a", damaged, clean, clean)
    assert item.given.shape == (SIDE, SIDE, 3)
    assert difference(item.given, item.target).sum() == 40 * 20 * 110
    assert difference(item.restored, item.target).max() == 0


@pytest.mark.data
def test_figures_of_the_real_pairs_are_those_that_are_known(restoration_data, identity, tmp_path):
    for folder, wanted, task in (
        ("rain_pairs", 25.966, "derain"),
        ("haze_pairs", 16.129, "dehaze"),
    ):
        result = evaluated(restoration_data / folder, identity, tmp_path / folder, task=task)
        assert result["psnr_input"] == pytest.approx(wanted, abs=1e-3)
        assert result["psnr"] == result["psnr_input"]
