"""Crops of a frame: their size, their pixels, and the map that the pixels follow."""

import time

import numpy as np
import pytest
import torch

from tasks.tracking.geometry.crop import channel_mean, crop, crop_mapping, widen
from tests.tolerances import assert_close

BOX = np.array([40.0, 30.0, 70.0, 55.0])
SIZES = [(2, 56), (4, 112), (5, 81)]


@pytest.fixture(scope="module")
def frame() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 90, 120), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def ramp() -> torch.Tensor:
    """A frame whose pixels say where they are: x, y, and a constant."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    return torch.stack([x + 0.5, y + 0.5, torch.full((90, 120), 7.0)])


@pytest.mark.data
@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(("factor", "out_size"), SIZES)
def test_crop_equals_the_official_one(lorat_ops, factor, out_size, index):
    image = torch.from_numpy(lorat_ops["crop.image_chw_u8"])
    box = lorat_ops["crop.boxes_xyxy"][index]

    def stored(name: str) -> np.ndarray:
        return lorat_ops[f"crop.af{factor}_s{out_size}_b{index}.{name}"]

    asked = crop_mapping(box, out_size, factor)
    np.testing.assert_allclose(
        np.stack([asked.scale, asked.translation]), stored("params"), rtol=1e-12, atol=1e-12
    )
    fill = channel_mean(image)
    np.testing.assert_allclose(fill.numpy(), lorat_ops["crop.mean"], rtol=1e-6)
    pixels, corrected = crop(image, asked, out_size, fill)
    # The official figures are of float32, ours of float64.
    found = np.stack([corrected.scale, corrected.translation])
    np.testing.assert_allclose(found, stored("adjusted"), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(corrected.apply(box), stored("box_in_crop"), rtol=1e-6, atol=1e-5)
    expected = torch.from_numpy(stored("out_f16"))
    if expected.ndim == 3:
        assert_close(pixels.half(), expected)
    else:
        half = out_size // 2
        some = torch.stack([pixels.mean(), pixels.std(), pixels[0, 3, 5], pixels[2, half, half]])
        assert_close(some, expected)
    np.testing.assert_allclose(
        corrected.invert(corrected.apply(box)), stored("box_back"), atol=1e-5
    )


@pytest.mark.parametrize(("factor", "out_size"), SIZES)
def test_pixels_follow_the_corrected_map_and_not_the_one_asked_for(ramp, factor, out_size):
    asked = crop_mapping(BOX, out_size, factor)
    pixels, corrected = crop(ramp, asked, out_size, torch.zeros(3))
    centres = np.arange(out_size) + 0.5
    grid = np.stack([centres, centres, centres, centres], axis=-1)

    def farthest(mapping) -> float:
        """How far a pixel's content is from where the map says that it comes from."""
        places = mapping.invert(grid)
        # The outermost source pixels are repeated, so places near the border are left out.
        inside_x = (pixels[2, out_size // 2] == 7) & torch.from_numpy(abs(places[:, 0] - 60) < 58)
        inside_y = (pixels[2, :, out_size // 2] == 7) & torch.from_numpy(
            abs(places[:, 1] - 45) < 43
        )
        inside_x[[0, -1]] = inside_y[[0, -1]] = False
        x = (pixels[0, out_size // 2].numpy() - places[:, 0])[inside_x.numpy()]
        y = (pixels[1, :, out_size // 2].numpy() - places[:, 1])[inside_y.numpy()]
        assert min(x.size, y.size) > out_size / 3
        return max(abs(x).max(), abs(y).max())

    assert farthest(corrected) < 1e-4
    assert farthest(asked) > 0.1


def test_box_comes_back_through_the_corrected_map_only(frame):
    asked = crop_mapping(BOX, 112, 4)
    _, corrected = crop(frame, asked, 112, channel_mean(frame))
    there = corrected.apply(BOX)
    assert abs(corrected.invert(there) - BOX).max() < 1e-6
    assert abs(asked.invert(there) - BOX).max() > 1e-3


@pytest.mark.parametrize("box", [BOX, [-5, -4, 12, 10], [110, 80, 119, 89], [-80, 20, -60, 40]])
def test_crop_of_a_constant_frame_is_constant(box):
    frame = torch.full((3, 90, 120), 0.0) + torch.tensor([10.0, 20.0, 30.0])[:, None, None]
    pixels, _ = crop(frame, crop_mapping(box, 56, 4), 56, channel_mean(frame))
    assert_close(pixels, torch.tensor([10.0, 20.0, 30.0])[:, None, None].expand(3, 56, 56))


def test_crop_outside_the_frame_is_all_fill(frame):
    asked = crop_mapping([-80, 20, -60, 40], 56, 2)
    fill = torch.tensor([1.0, 2.0, 3.0])
    pixels, mapping = crop(frame, asked, 56, fill)
    assert_close(pixels, fill[:, None, None].expand(3, 56, 56))
    assert mapping is asked


def test_crop_that_touches_the_frame_by_a_hair_is_still_a_crop(frame):
    box = np.array([120.0, 20.0, 140.0, 40.0])  # its crop begins at 110
    for shift in (9.9999, 9.99999, 10.0, 10.00001):
        moved = box + np.array([shift, 0, shift, 0])
        pixels, mapping = crop(frame, crop_mapping(moved, 56, 2), 56, torch.zeros(3))
        assert bool(pixels.isfinite().all())
        assert np.isfinite(mapping.scale).all()


def test_whole_pixels_at_scale_one_are_copied(frame):
    box = np.array([40.0, 30.0, 68.0, 58.0])
    pixels, mapping = crop(frame, crop_mapping(box, 56, 2), 56, torch.zeros(3))
    assert torch.equal(pixels, frame[:, 16:72, 26:82].float())
    assert mapping.scale.tolist() == [1.0, 1.0]
    assert mapping.translation.tolist() == [-26.0, -16.0]


def test_bytes_and_floats_give_the_same_crop(frame):
    asked = crop_mapping(BOX, 56, 4)
    fill = channel_mean(frame)
    assert_close(crop(frame.float(), asked, 56, fill)[0], crop(frame, asked, 56, fill)[0])


def test_square_object_fills_its_share_of_the_crop():
    mapping = crop_mapping([10, 20, 40, 50], 224, 4)
    np.testing.assert_allclose(mapping.apply([10, 20, 40, 50]), [84, 84, 140, 140])


def test_long_object_gets_more_context_than_by_its_area():
    mapping = crop_mapping([0, 0, 40, 20], 224, 4)
    side = 224 / mapping.scale[0]
    assert mapping.scale[0] == mapping.scale[1]
    np.testing.assert_allclose(side**2, (40 + 3 * 30) * (20 + 3 * 30))
    assert side > 4 * np.sqrt(40 * 20) * 1.05


def test_small_box_is_widened_about_its_centre():
    assert widen([50, 40, 54, 70]).tolist() == [47, 40, 57, 70]
    assert widen([50, 40, 70, 70]).tolist() == [50, 40, 70, 70]
    assert widen([50, 40, 50, 40]).tolist() == [45, 35, 55, 45]


def test_search_crop_is_quick():
    frame = torch.randint(256, (240, 360, 3), dtype=torch.uint8).permute(2, 0, 1)
    fill = channel_mean(frame)

    def seconds() -> float:
        start = time.perf_counter()
        crop(frame, crop_mapping([100, 80, 160, 150], 224, 4), 224, fill)
        return time.perf_counter() - start

    # About 1 ms on one thread; the least of many, because other work shares the machine.
    assert min(seconds() for _ in range(20)) < 3e-3
