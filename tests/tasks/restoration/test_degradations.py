"""Degradations: what they leave alone, how strong they are, in which order PROD applies them."""

from collections import Counter
from functools import partial
from itertools import permutations

import numpy as np
import pytest

from tasks.restoration.degradations import blur, noise, rain
from tasks.restoration.degradations.jpeg import compressed, jpeg
from tasks.restoration.degradations.prod import MODES, ORDER, Prod
from tasks.restoration.degradations.synthetic import TASKS, coarsen
from visionlora.errors import ConfigError

FUNCTIONS = {**Prod().functions, **TASKS}


def rng(*seed):
    return np.random.default_rng(seed)


def photo(height=48, width=64):
    """Return a smooth picture with some edges."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / 16
    waves = [np.sin(x + 2 * y), np.cos(x * y / 2), np.sign(np.sin(x)) * 0.5]
    return (np.stack(waves, axis=2) * 0.35 + 0.5).astype(np.float32)


def psnr(one, other):
    return -10 * np.log10(np.mean((one - other) ** 2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shape_and_type_stay_and_something_changes(name):
    image = photo(45, 63)
    before = image.copy()
    for number in range(4):
        made, drawn = FUNCTIONS[name](image, rng(number))
        assert made.shape == image.shape
        assert made.dtype == np.float32
        assert np.isfinite(made).all()
        assert isinstance(drawn, dict)
        assert drawn
    np.testing.assert_array_equal(image, before)
    assert not np.array_equal(made, image)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_generator_decides_everything(name):
    one, other = (FUNCTIONS[name](photo(), rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("function", [blur.blur, blur.motion])
def test_blur_keeps_a_plain_picture(function):
    plain = np.full((40, 30, 3), 0.37, np.float32)
    for number in range(20):
        np.testing.assert_allclose(function(plain, rng(number))[0], plain, atol=2e-6)


def test_a_motion_kernel_is_as_long_as_said_and_centred():
    for angle in (0.0, 0.7, 2.0):
        kernel = blur.path(15.0, angle, 0.0, rng(0))
        y, x = np.nonzero(kernel > 1e-6)
        extent = np.hypot(np.ptp(x), np.ptp(y))
        assert 13 <= extent <= 18
        half = kernel.shape[0] // 2
        rows, columns = np.mgrid[: kernel.shape[0], : kernel.shape[1]]
        assert abs((kernel * rows).sum() - half) < 1e-4
        assert abs((kernel * columns).sum() - half) < 1e-4


def test_a_gaussian_has_the_variance_it_was_asked_for():
    kernel = blur.gaussian(1.5, 0.8, 0.0)
    offsets = np.arange(kernel.shape[0]) - kernel.shape[0] // 2
    np.testing.assert_allclose((kernel.sum(axis=0) * offsets**2).sum(), 1.5**2, rtol=0.02)
    np.testing.assert_allclose((kernel.sum(axis=1) * offsets**2).sum(), 0.8**2, rtol=0.02)


@pytest.mark.parametrize("grey", [False, True])
def test_noise_has_the_deviation_that_was_drawn(grey):
    plain = np.full((200, 200, 3), 0.5, np.float32)
    added = noise.gaussian_noise(plain, 20.0, rng(1), grey=grey) - plain
    np.testing.assert_allclose(added.std() * 255, 20.0, rtol=0.03)
    assert np.array_equal(added[..., 0], added[..., 1]) is grey


def test_counted_photons_have_the_variance_of_the_light():
    plain = np.full((300, 300, 3), 0.4, np.float32)
    counted = noise._counted(plain, 500.0, rng(2))
    np.testing.assert_allclose(counted.var(), 0.4 / 500, rtol=0.05)
    np.testing.assert_allclose(counted.mean(), 0.4, rtol=0.01)


def test_no_noise_and_no_rain_change_nothing(monkeypatch):
    image = photo()
    np.testing.assert_array_equal(noise.gaussian_noise(image, 0.0, rng(0)), image)
    monkeypatch.setattr(rain, "OPACITY", (0.0, 0.0))
    np.testing.assert_array_equal(rain.rain(image, rng(0))[0], image)


def test_rain_only_brightens_and_falls_down():
    dark = np.full((96, 96, 3), 0.2, np.float32)
    made, _ = rain.rain(dark, rng(5))
    assert (made >= dark - 1e-6).all()
    assert (made <= 1 + 1e-6).all()
    streaks = made[..., 0]
    down = np.abs(np.diff(streaks, axis=0)).mean()
    across = np.abs(np.diff(streaks, axis=1)).mean()
    assert across > 1.5 * down


def test_jpeg_loses_little_at_high_quality_and_more_at_low():
    image = photo()
    assert psnr(compressed(image, 95), image) > 35
    assert psnr(compressed(image, 95), image) > psnr(compressed(image, 20), image) + 3
    qualities = {jpeg(image, rng(number))[1]["quality"] for number in range(300)}
    assert min(qualities) == 20 or min(qualities) < 24
    assert max(qualities) > 91


def test_a_coarse_picture_keeps_its_mean_and_loses_detail():
    image = photo()
    made, _ = coarsen(image, rng(0))
    np.testing.assert_allclose(made.mean(), image.mean(), atol=0.01)
    assert np.abs(np.diff(made, axis=1)).max() < 0.5 * np.abs(np.diff(image, axis=1)).max()


def test_prod_draws_every_number_and_every_order():
    prod, generator = Prod(), rng(0)
    draws = [prod.choose(generator) for _ in range(2000)]
    counts = Counter(map(len, draws))
    # Chi-square with 4 degrees of freedom: 18.5 is the 99.9 % point.
    assert sum((counts[k] - 400) ** 2 / 400 for k in range(1, 6)) < 18.5
    assert {draw[0] for draw in draws if len(draw) == 1} == set(ORDER)
    assert {tuple(draw) for draw in draws if len(draw) == 2} == set(permutations(ORDER, 2))
    assert all(len(set(draw)) == len(draw) for draw in draws)


def test_the_other_modes_are_what_they_say():
    draws = {
        mode: [Prod(mode).choose(rng(number)) for number in range(100)]
        for mode in ("single", "fixed", "fixed-subset")
    }
    assert {len(draw) for draw in draws["single"]} == {1}
    assert all(draw == list(ORDER) for draw in draws["fixed"])
    assert {len(draw) for draw in draws["fixed-subset"]} == {1, 2, 3, 4, 5}
    assert all(draw == sorted(draw, key=ORDER.index) for draw in draws["fixed-subset"])


def test_order_matters():
    image = photo()
    add = partial(noise.gaussian_noise, sigma=25.0)
    one = compressed(add(image, rng=rng(0)), 40)
    other = add(compressed(image, 40), rng=rng(0))
    assert np.abs(one - other).max() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_prod_stays_in_range_and_says_what_it_did(mode):
    image = photo()
    made, drawn = Prod(mode, patch=64)(image, rng(1))
    assert made.min() >= 0
    assert made.max() <= 1
    assert [step["function"] for step in drawn["steps"]] == Prod(mode).choose(rng(1))


def test_some_pictures_stay_clean_if_wanted():
    prod = Prod(identity=0.5)
    clean = sum(not prod.choose(rng(number)) for number in range(400))
    assert 150 < clean < 250
    assert all(Prod().choose(rng(number)) for number in range(100))


def test_lengths_shrink_with_the_patch():
    lengths = {
        patch: [
            Prod(patch=patch).functions["motion"](photo(), rng(number))[1]["length"]
            for number in range(50)
        ]
        for patch in (64, 256)
    }
    np.testing.assert_allclose(np.max(lengths[64]), np.max(lengths[256]) / 2, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "prodd"}, "did you mean 'prod'"),
        ({"most": 6}, "between 1 and 5 functions"),
        ({"identity": 1.5}, "identity share"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Prod(**options)


def test_rain_covers_as_much_as_was_drawn():
    black = np.zeros((160, 160, 3), np.float32)
    for number in range(6):
        made, drawn = rain.rain(black, rng(number))
        light = made[..., 0].mean() / drawn["opacity"]
        # Streaks that cross are one streak, and soft ones are wider and fainter.
        assert 0.5 * drawn["cover"] < light < 1.3 * drawn["cover"]
