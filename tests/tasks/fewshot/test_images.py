"""Pictures: unreadable ones are found, evaluation keeps the centre, augmentation is repeatable."""

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.fewshot.images import (
    Transform,
    UnreadableImage,
    augment_batch,
    cached_pixels,
    evaluation_pixels,
    open_image,
)
from tasks.fewshot.tiny import prepare_images

HALF = (0.5, 0.5, 0.5)
SMALL = Transform(16, HALF, HALF)
TINY = Transform(16, HALF, HALF, oversample=2)


@pytest.fixture
def wide() -> np.ndarray:
    """A picture twice as wide as high: red, then green, then blue."""
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:60, 1] = pixels[:, 60:, 2] = 255
    return pixels


def test_evaluation_keeps_the_centre(wide):
    image = evaluation_pixels(wide, SMALL)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))
    assert (image[1, :, 1:-1] > 250).all()
    squashed = evaluation_pixels(wide, Transform(16, HALF, HALF, squash=True))
    assert squashed[0, 8, 0] > 250
    assert squashed[2, 8, 15] > 250


def test_evaluation_equals_open_clips_transform(wide):
    from open_clip import image_transform

    theirs = image_transform(24, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    ours = evaluation_pixels(wide, Transform(24, HALF, HALF))
    torch.testing.assert_close(ours / 255, theirs(Image.fromarray(wide)))


def test_tiny_pictures_are_those_of_its_pretraining():
    digit = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    ours = evaluation_pixels(digit, TINY) / 127.5 - 1
    theirs = prepare_images(torch.from_numpy(digit)[None, None])[0]
    assert (ours - theirs).abs().max() < 2.5 / 127.5


def test_grey_palette_and_deep_pictures_become_rgb(tmp_path):
    deep = Image.fromarray(np.full((9, 9), 128 * 256, dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    for image in (open_image(tmp_path / "deep.png"), open_image(np.full((9, 9), 128, np.uint8))):
        assert image.mode == "RGB"
        assert image.getpixel((4, 4)) == (128, 128, 128)
    Image.new("P", (9, 9)).save(tmp_path / "palette.png", transparency=0)
    assert open_image(tmp_path / "palette.png").mode == "RGB"


def test_rotated_photographs_are_turned_upright(tmp_path, wide):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (40, 80)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken", None])
def test_broken_files_are_unreadable(tmp_path, wide, content):
    file = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(wide).save(file)
        file.write_bytes(file.read_bytes()[:-40])
    else:
        file.write_bytes(content)
    with pytest.raises(UnreadableImage):
        open_image(file)


@pytest.mark.parametrize("augment", ["crop", "shift"])
def test_augmentation_depends_on_the_generator_alone(wide, augment):
    images = [cached_pixels(wide, SMALL, augment)] * 4

    def batch(seed: int) -> torch.Tensor:
        torch.rand(1)
        return augment_batch(images, 16, augment, torch.Generator().manual_seed(seed))

    assert batch(1).shape == (4, 3, 16, 16)
    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))


def test_shift_moves_at_most_a_sixteenth_and_keeps_every_pixel(wide):
    image = evaluation_pixels(wide, SMALL)
    moved = augment_batch([image] * 50, 16, "shift", torch.Generator().manual_seed(0))
    allowed = [torch.roll(image, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert all(any(torch.equal(one, other) for other in allowed) for one in moved)


def test_crops_flip_half_of_the_pictures():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))
    crops = augment_batch(
        [cached_pixels(ramp, SMALL, "crop")] * 200, 16, "crop", torch.Generator().manual_seed(0)
    ).int()
    falling = (crops[:, 0, 8, 0] > crops[:, 0, 8, -1]).float().mean()
    assert 0.35 < falling < 0.65
