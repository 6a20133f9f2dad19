"""Pictures come back as they were: grey, transparent, of 16 bits; broken ones are named."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tasks.restoration.images import (
    Picture,
    header_size,
    pictures_below,
    read_picture,
    write_picture,
)
from visionlora.errors import DataError, OutputError

RNG = np.random.default_rng(0)


def stored(kind):
    """Return an array as OpenCV writes it."""
    shape = {"grey": (9, 7), "rgb": (9, 7, 3), "rgba": (9, 7, 4)}
    name, _, bits = kind.partition("-")
    dtype = np.uint16 if bits == "16" else np.uint8
    return RNG.integers(0, np.iinfo(dtype).max, shape[name], dtype)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("kind", ["grey", "rgb", "rgba", "grey-16", "rgb-16", "rgba-16"])
def test_a_picture_is_written_as_it_came(kind, suffix, tmp_path):
    array = stored(kind)
    cv2.imwrite(str(tmp_path / f"one.{suffix}"), array)
    picture = read_picture(tmp_path / f"one.{suffix}")
    assert picture.pixels.dtype == np.float32
    assert picture.pixels.shape == (9, 7, 3)
    write_picture(tmp_path / "two.png", picture.pixels, picture)
    again = cv2.imread(str(tmp_path / "two.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(again, array)


def test_channels_are_red_green_blue(tmp_path):
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 2] = 255  # OpenCV's order
    cv2.imwrite(str(tmp_path / "red.png"), red)
    assert read_picture(tmp_path / "red.png").pixels[0, 0].tolist() == [1, 0, 0]


def test_palettes_are_colours(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    palette = Image.fromarray(colours).quantize(4)
    palette.save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.levels, np.asarray(palette.convert("RGB")))
    assert picture.alpha is None
    assert not picture.grey


def test_an_orientation_is_not_applied(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (7, 9)).save(tmp_path / "a.jpg", exif=turned)
    assert read_picture(tmp_path / "a.jpg").size == header_size(tmp_path / "a.jpg") == (9, 7)


def test_values_outside_the_range_are_clamped(tmp_path):
    like = Picture(np.zeros((1, 2, 3), np.uint8))
    write_picture(tmp_path / "a.png", np.array([[[-1, 0.5, 2]] * 2], np.float32), like)
    assert read_picture(tmp_path / "a.png").levels[0, 0].tolist() == [0, 128, 255]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("a.png", "empty.jpg"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read_picture(tmp_path / name)
    with pytest.raises(DataError, match=r"no picture .*b\.png"):
        read_picture(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_files_that_are_cut_short_are_named(suffix, tmp_path, capfd):
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), RNG.integers(0, 255, (40, 50, 3), np.uint8))
    assert read_picture(path).size == header_size(path) == (40, 50)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=f"a.{suffix} cannot be read"):
        read_picture(path)
    assert "ERROR" not in capfd.readouterr().err


def test_a_file_that_claims_to_be_huge_is_refused(tmp_path):
    def chunk(kind, data):
        sum32 = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum32

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rest)
    for read in (read_picture, header_size):
        with pytest.raises(DataError, match=r"a\.png cannot be read"):
            read(tmp_path / "a.png")


def test_formats_that_would_lose_something_are_refused(tmp_path):
    deep = Picture(np.zeros((2, 2, 3), np.uint16))
    with pytest.raises(OutputError, match="jpg holds neither 16 bits"):
        write_picture(tmp_path / "a.jpg", deep.pixels, deep)
    with pytest.raises(OutputError, match="unknown picture format"):
        write_picture(tmp_path / "a.gif", deep.pixels, deep)
    assert not list(tmp_path.iterdir())


def test_folders_are_searched_in_order(tmp_path):
    for name in ("b/2.PNG", "a/1.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in pictures_below(tmp_path)] == ["1.jpg", "2.PNG"]
    with pytest.raises(DataError, match="no folder"):
        pictures_below(tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no picture in"):
        pictures_below(tmp_path / "c")
