"""Frames come as they are seen, and a frame that cannot be read is named."""

import numpy as np
import pytest
from PIL import Image

from tasks.tracking.images import read_image
from visionlora.errors import DataError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_png_is_read_as_written(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    np.testing.assert_array_equal(read_image(tmp_path / "frame.png"), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_has_three_channels_of_bytes(tmp_path, pixels, mode):
    Image.fromarray(pixels).convert(mode).save(tmp_path / "frame.tif")
    frame = read_image(tmp_path / "frame.tif")
    assert frame.shape == (5, 7, 3)
    assert frame.dtype == np.uint8


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(tmp_path / "frame.png")
    assert read_image(tmp_path / "frame.png")[0, :, 0].tolist() == [0, 1, 255]


def test_turned_photograph_is_upright(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise to show
    Image.fromarray(pixels).save(tmp_path / "frame.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "frame.png"), np.rot90(pixels, -1))


def test_missing_frame_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no frame .*00000007\.jpg"):
        read_image(tmp_path / "00000007.jpg")


@pytest.mark.parametrize("keep", [0, 40, -20])
def test_truncated_frame_is_refused(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "00000001.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot read the frame .*00000001\.jpg: ."):
        read_image(path)


def test_folder_is_no_frame(tmp_path):
    with pytest.raises(DataError, match="cannot read the frame"):
        read_image(tmp_path)
