"""Restoring files and folders: nothing is lost, the input least of all, and a run can go on."""

import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from tasks.restoration.images import Picture, read_picture, to_levels, write_levels
from tasks.restoration.inference.restorer import Restorer
from tasks.restoration.orientation import TAG, upright
from tasks.restoration.run import RunConfig, run
from tests.tasks.restoration.pictures import waves, write
from tests.tasks.restoration.small_networks import write_adapter, write_base
from visionlora.errors import AdapterFileError, ConfigError, DataError, OutputError


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "same.safetensors")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "deep/b.png", "deep/c.bmp")):
        write(tmp_path / "in" / name, waves(number, 21, 34))
    return tmp_path / "in"


def config(source, output, base, **options):
    given = {"device": "cpu", "base": str(base), **options}
    return RunConfig(input=str(source), output=str(output), **given)


def restored(source, output, base, **options):
    return run(config(source, output, base, **options))


def stored(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_a_folder_keeps_its_names(folder, identity, tmp_path):
    out = tmp_path / "out"
    assert restored(folder, out, identity) == {"restored": 3, "kept": 0}
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {"a.png", "deep/b.png", "deep/c.png", "restored.jsonl"}
    for one, other in (("a.png", "a.png"), ("deep/c.bmp", "deep/c.png")):
        assert np.array_equal(stored(folder / one), stored(out / other))


def test_every_picture_comes_back_as_it_was(identity, tmp_path):
    source, size = tmp_path / "in", (19, 31)
    alpha = np.arange(19 * 31, dtype=np.uint16).reshape(size)
    for name, dtype in (("8", np.uint8), ("16", np.uint16)):
        levels = to_levels(waves(0, *size), dtype)
        write_levels(source / f"plain{name}.png", levels, Picture(levels))
        write_levels(source / f"grey{name}.png", levels, Picture(levels, grey=True))
        write_levels(source / f"alpha{name}.png", levels, Picture(levels, alpha.astype(dtype)))
        write_levels(source / f"tif{name}.tif", levels, Picture(levels))
    restored(source, tmp_path / "out", identity, tile=16, overlap=4)
    restored(source, tmp_path / "same", identity, format="same", ensemble=True)
    for path in source.iterdir():
        before = stored(path)
        for after in (
            stored(tmp_path / "out" / f"{path.stem}.png"),
            stored(tmp_path / "same" / path.name),
        ):
            assert after.dtype == before.dtype
            assert np.array_equal(after, before), path.name


def test_one_picture_may_be_given_a_name_or_a_folder(folder, identity, tmp_path):
    restored(folder / "a.png", tmp_path / "made.tif", identity)
    restored(folder / "a.png", tmp_path / "new", identity)
    for path in (tmp_path / "made.tif", tmp_path / "new" / "a.png"):
        assert np.array_equal(stored(path), stored(folder / "a.png"))
    assert not list(tmp_path.glob("*.jsonl"))  # nothing beside a file that has a name


def test_the_adapter_restores(folder, identity, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", identity, brighter=0.1)
    restored(folder, tmp_path / "out", identity, adapter=str(adapter))
    before, after = (read_picture(place / "a.png").pixels for place in (folder, tmp_path / "out"))
    assert np.abs(after - np.clip(before + 0.1, 0, 1)).max() < 1 / 255


@pytest.mark.parametrize("place", ["in", "in/inside", "in/a.png", "linked", "in/deep/../..", "."])
def test_the_input_is_never_written_to(folder, identity, tmp_path, place):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(folder / "a.png")
    (tmp_path / "a.png").hardlink_to(folder / "a.png")
    with pytest.raises(OutputError, match=r"overwritten|inside of the input|is a file"):
        restored(folder, tmp_path / place, identity, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_one_picture_is_not_restored_over_itself(folder, identity):
    for output in (folder / "a.png", folder):
        with pytest.raises(OutputError, match="overwritten"):
            restored(folder / "a.png", output, identity, overwrite=True)


def test_a_broken_file_is_named_and_the_run_goes_on_when_it_is_mended(
    folder, identity, tmp_path, capsys
):
    out, whole = tmp_path / "out", (folder / "deep" / "b.png").read_bytes()
    (folder / "deep" / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1 of 3 pictures .*b\.png.* the other 2 are in"):
        restored(folder, out, identity)
    assert "b.png" in capsys.readouterr().err
    assert not (out / "deep" / "b.png").exists()
    (folder / "deep" / "b.png").write_bytes(whole)
    when = (out / "a.png").stat().st_mtime_ns
    assert restored(folder, out, identity) == {"restored": 1, "kept": 2}
    assert "2 of 3 pictures are restored already" in capsys.readouterr().out
    assert (out / "a.png").stat().st_mtime_ns == when
    assert restored(folder, out, identity, overwrite=True) == {"restored": 3, "kept": 0}
    assert (out / "a.png").stat().st_mtime_ns > when


def test_a_run_that_was_stopped_goes_on(folder, identity, tmp_path):
    out, first = tmp_path / "out", Restorer(config(folder, tmp_path, identity))
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return type(first).__call__(first, *args)

    class Stopped(Restorer):
        __call__ = staticmethod(stopped)

    with pytest.raises(KeyboardInterrupt):
        run(config(folder, out, identity), Stopped(config(folder, out, identity)))
    with (out / "restored.jsonl").open("a") as file:
        file.write('{"file": "dee')  # killed while it wrote
    assert restored(folder, out, identity) == {"restored": 2, "kept": 1}
    assert np.array_equal(stored(out / "deep" / "b.png"), stored(folder / "deep" / "b.png"))


def test_a_picture_that_was_begun_anew_is_not_finished(folder, identity, tmp_path):
    out = tmp_path / "out"
    restored(folder, out, identity)
    lines = (out / "restored.jsonl").read_text().splitlines()
    (out / "restored.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    assert restored(folder, out, identity) == {"restored": 1, "kept": 2}


def test_results_of_another_adapter_are_not_mixed_or_replaced_unasked(folder, identity, tmp_path):
    out = tmp_path / "out"
    restored(folder, out, identity)
    before = (out / "a.png").read_bytes()
    adapter = str(write_adapter(tmp_path / "adapter", identity))
    with pytest.raises(OutputError, match=r"a\.png was restored by another network or adapter"):
        restored(folder, out, identity, adapter=adapter)
    assert (out / "a.png").read_bytes() == before
    restored(folder, out, identity, adapter=adapter, overwrite=True)
    assert (out / "a.png").read_bytes() != before


def test_pictures_of_others_are_not_replaced_unasked(folder, identity, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "deep" / "b.png", tmp_path / "out" / "a.png")
    with pytest.raises(OutputError, match="not written by this command"):
        restored(folder, tmp_path / "out", identity)
    assert not (tmp_path / "out" / "deep").exists()
    made = tmp_path / "made.png"
    shutil.copy(folder / "deep" / "b.png", made)
    assert restored(folder / "a.png", made, identity) == {"restored": 0, "kept": 1}
    assert np.array_equal(stored(made), stored(folder / "deep" / "b.png"))


def test_an_adapter_of_another_base_is_refused(folder, identity, tmp_path):
    other = write_base(tmp_path / "other.safetensors", change=1)
    adapter = str(write_adapter(tmp_path / "adapter", other))
    with pytest.raises(AdapterFileError, match=r"adapter of other\.safetensors"):
        restored(folder, tmp_path / "out", identity, adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_two_pictures_with_one_name_are_refused(folder, identity, tmp_path):
    write(folder / "a.bmp", waves(7))
    with pytest.raises(DataError, match=r"a\.bmp and a\.png would both become"):
        restored(folder, tmp_path / "out", identity)
    assert restored(folder, tmp_path / "out", identity, format="same")["restored"] == 4


def test_a_format_that_cannot_hold_a_picture_costs_that_picture_alone(folder, identity, tmp_path):
    levels = to_levels(waves(0), np.uint16)
    write_levels(folder / "deep.png", levels, Picture(levels))
    with pytest.raises(DataError, match=r"1 of 4 .*deep\.jpg.*16 bits"):
        restored(folder, tmp_path / "out", identity, format="jpg")
    assert (tmp_path / "out" / "a.jpg").is_file()
    assert not (tmp_path / "out" / "deep.jpg").exists()


@pytest.mark.parametrize("number", range(1, 10))
def test_photographs_stand_as_their_camera_says(tmp_path, number):
    image = Image.fromarray(to_levels(waves(0, 12, 20)))
    exif = Image.Exif()
    exif[TAG] = number
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    picture = read_picture(tmp_path / "a.png")
    alpha = picture.levels[..., 0].copy()
    found = upright(Picture(picture.levels, alpha), tmp_path / "a.png")
    assert np.array_equal(found.levels, wanted)
    assert np.array_equal(found.alpha, wanted[..., 0])


def test_progress_counts_pixels_and_tiles(folder, identity, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("visionlora.training.Progress.show", lambda _, *at: told.append(at))
    restored(folder, tmp_path / "out", identity, tile=20, overlap=0)
    percents = [percent for percent, _ in told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert "a.png, tile 2 of 4" in told[1][1]
    assert told[-1][1] == "3 of 3 pictures,"


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [("nowhere", DataError, "no folder of pictures"), ("empty", DataError, "no picture in")],
)
def test_nothing_to_restore_is_said(identity, tmp_path, source, error, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=said):
        restored(tmp_path / source, tmp_path / "out", identity)


def test_a_base_that_is_not_there_is_said_before_anything_is_written(folder, tmp_path):
    with pytest.raises(ConfigError, match="no base network"):
        restored(folder, tmp_path / "out", "nowhere.pth")
    assert not (tmp_path / "out").exists()


MEASURED = """
import resource, sys
from tasks.restoration.run import RunConfig, run
run(RunConfig(input=sys.argv[1], output=sys.argv[2], base="nafnet-tiny:random", device="cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_24_megapixels_need_less_than_4_gigabytes(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (250, 375, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "large.png"), cv2.resize(coarse, (6000, 4000)))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "large.png"), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert stored(tmp_path / "out" / "large.png").shape == (4000, 6000, 3)
    assert int(said.split()[-1]) < 4096
