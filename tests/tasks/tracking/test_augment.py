"""What augmentation does to pixels, boxes and masks, and how often."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from tasks.tracking.geometry.raster import cells
from tasks.tracking.training.augment import JITTER, Augmentation, Crop, flip, jitter_colour
from tests.tasks.tracking.test_pairs import within

BOX = np.array([5.0, 8.0, 21.0, 29.0])


def photo(side, seed=0):
    """Smooth colours, 0..255, none of them grey."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def crop(side, seed=0, box=BOX):
    return Crop(photo(side, seed).astype(np.float32), box)


def marked(side):
    """Black, but for the object."""
    pixels = np.zeros((side, side, 3), np.float32)
    x1, y1, x2, y2 = BOX.astype(int)
    pixels[y1:y2, x1:x2] = 200.0
    return Crop(pixels, BOX)


def seen(pixels):
    rows, columns = np.nonzero(pixels[..., 0] > 60)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_flipping_keeps_box_and_pixels_together_and_twice_is_nothing():
    once = flip(marked(40))
    np.testing.assert_array_equal(once.box, [40 - 21, 8, 40 - 5, 29])
    np.testing.assert_array_equal(once.box, seen(once.pixels))
    twice = flip(once)
    np.testing.assert_array_equal(twice.box, BOX)
    np.testing.assert_array_equal(twice.pixels, marked(40).pixels)


def test_augmented_pixels_boxes_and_masks_agree():
    augment = Augmentation(third=0)
    for seed in range(20):
        pair = augment(marked(40), marked(56), np.random.default_rng(seed))
        for result, side in zip(pair, (40, 56), strict=True):
            np.testing.assert_array_equal(result.box, seen(result.pixels))
            touched = cells(result.box, side, side // 8)
            blocks = (result.pixels[..., 0] > 60).reshape(side // 8, 8, side // 8, 8)
            np.testing.assert_array_equal(touched, blocks.any(axis=(1, 3)))


def test_crops_are_flipped_independently():
    augment = Augmentation(third=0)
    drawn = Counter()
    for seed in range(400):
        pair = augment(marked(40), marked(56), np.random.default_rng(seed))
        drawn[tuple(item.box[0] != BOX[0] for item in pair)] += 1
    assert len(drawn) == 4
    assert all(within(count, 400, 1 / 4) for count in drawn.values())


def test_colour_jitter_is_torchvisions_in_the_drawn_order():
    pixels = photo(32).astype(np.float32) / 255
    orders = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        order = tuple(rng.permutation(3))
        factors = rng.uniform(1 - JITTER, 1 + JITTER, 3)
        orders.add(order)
        expected = torch.from_numpy(pixels).permute(2, 0, 1)
        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
        for which in order:
            expected = changes[which](expected, float(factors[which]))
        found = jitter_colour(pixels.copy(), np.random.default_rng(seed))
        np.testing.assert_allclose(found, expected.permute(1, 2, 0), atol=2e-6)
    assert len(orders) == 6


def test_both_crops_have_their_own_colours():
    one, two = Augmentation(third=0)(crop(40), crop(40), np.random.default_rng(2))
    if one.box[0] != two.box[0]:
        two = two._replace(pixels=two.pixels[:, ::-1])
    assert not np.array_equal(one.pixels, two.pixels)


def third_step(pixels, kind, radius=None):
    image = Image.fromarray(pixels)
    if kind == "grey":
        return np.asarray(ImageOps.grayscale(image).convert("RGB"))
    if kind == "solarised":
        return np.asarray(ImageOps.solarize(image, 128))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(radius))))


def kind_of(before, after):
    """Which of the three changes made `after`."""
    for kind in ("grey", "solarised"):
        if np.abs(third_step(before, kind).astype(int) - after).max() <= 1:
            return kind
    errors = [
        np.abs(third_step(before, "blurred", radius).astype(int) - after).mean()
        for radius in np.linspace(0.1, 2, 20)  # steps of 0.1: coarser ones are a level off
    ]
    assert min(errors) < 1.0, "none of the three"
    return "blurred"


def test_exactly_one_of_three_happens_and_to_both_crops():
    whole, without = Augmentation(), Augmentation(third=0)
    drawn = Counter()
    for seed in range(60):
        before = without(crop(40), crop(56, 1), np.random.default_rng(seed))
        after = whole(crop(40), crop(56, 1), np.random.default_rng(seed))
        kinds = [kind_of(b.pixels, a.pixels) for b, a in zip(before, after, strict=True)]
        assert kinds[0] == kinds[1]
        drawn[kinds[0]] += 1
    assert len(drawn) == 3
    assert all(within(count, 60, 1 / 3) for count in drawn.values())


def test_the_third_step_comes_to_the_share_that_was_asked_for():
    augment, without = Augmentation(third=0.25), Augmentation(third=0)
    changed = 0
    for seed in range(200):
        pairs = [
            item(crop(40), crop(40), np.random.default_rng(seed)) for item in (augment, without)
        ]
        changed += not np.array_equal(pairs[0][1].pixels, pairs[1][1].pixels)
    assert within(changed, 200, 0.25)


def test_equal_generators_give_equal_pairs_whatever_came_before():
    augment = Augmentation()
    first = augment(crop(40), crop(56), np.random.default_rng(7))
    augment(crop(40), crop(56), np.random.default_rng(8))
    for one, two in zip(first, augment(crop(40), crop(56), np.random.default_rng(7)), strict=True):
        np.testing.assert_array_equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.box, two.box)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_clipped_to_their_crops(seed):
    outside = np.array([-10.0, 20.0, 15.0, 70.0])
    _, search = Augmentation()(crop(40), crop(56, box=outside), np.random.default_rng(seed))
    x1, y1, x2, y2 = search.box
    assert [y1, y2] == [20, 56]
    assert (x1, x2) in {(0, 15), (41, 56)}


def test_what_goes_in_is_left_as_it_was():
    template, search = crop(40), crop(56)
    before = template.pixels.copy(), search.pixels.copy()
    Augmentation()(template, search, np.random.default_rng(0))
    np.testing.assert_array_equal(template.pixels, before[0])
    np.testing.assert_array_equal(search.pixels, before[1])
