"""Jittered crops: how far, how much, each axis alone, and when to give up."""

import numpy as np
import pytest

from tasks.tracking.geometry.crop import crop_mapping
from tasks.tracking.geometry.jitter import ATTEMPTS, LEAST_VISIBLE, jittered_mapping

BOX = np.array([100.0, 80.0, 160.0, 120.0])
LONG = np.array([0.0, 50.0, 400.0, 52.0])


@pytest.fixture(scope="module")
def draws() -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the scales' changes, and moves in mean sides of the object, unselected.

    The crop is so large that the object never leaves it, so every first attempt is taken.
    """
    generator = np.random.default_rng(0)
    plain = crop_mapping(BOX, 2048, 32).scale
    scales, moves = [], []
    for _ in range(1000):
        mapping = jittered_mapping(BOX, 2048, 32, generator)
        there = mapping.apply(BOX)
        scales.append(np.log(mapping.scale / plain))
        moves.append(((there[:2] + there[2:]) / 2 - 1024) / np.mean(there[2:] - there[:2]))
    return np.array(scales), np.array(moves)


def test_scales_are_log_normal(draws):
    np.testing.assert_allclose(draws[0].std(axis=0), 0.25, rtol=0.06)
    np.testing.assert_allclose(draws[0].mean(axis=0), 0, atol=0.025)


def test_each_axis_is_drawn_alone(draws):
    for values in draws:
        assert abs(np.corrcoef(values.T)[0, 1]) < 0.08


def test_moves_are_uniform_within_three_sides(draws):
    moves = draws[1]
    assert 2.95 < abs(moves).max() <= 3
    np.testing.assert_allclose(moves.std(axis=0), np.sqrt(3), rtol=0.06)


def test_a_shorter_reach_keeps_a_square_object_whole_but_for_its_scale():
    generator, square = np.random.default_rng(4), np.array([50.0, 50.0, 90.0, 90.0])
    cut = []
    for reach in (0.75, 3.0):
        found = [
            jittered_mapping(square, 224, 4, generator, reach).apply(square) for _ in range(80)
        ]
        cut.append(np.mean([(box < 0).any() or (box > 224).any() for box in found]))
    assert cut[0] < 0.05
    assert cut[1] > 0.4


def test_no_spread_keeps_the_aspect():
    mapping = jittered_mapping(BOX, 224, 4, np.random.default_rng(5), spread=0.0)
    np.testing.assert_array_equal(mapping.scale, crop_mapping(BOX, 224, 4).scale)


def test_enough_of_the_object_is_in_the_crop():
    generator = np.random.default_rng(1)
    cut = 0
    for _ in range(200):
        mapping = jittered_mapping(BOX, 112, 4, generator)
        there = mapping.apply(BOX)
        seen = np.clip(there, 0, 112)
        assert (seen[2:] - seen[:2] >= LEAST_VISIBLE).all()
        cut += bool((seen != there).any())
    assert cut > 20  # objects that are partly in the crop are taken


def test_hopeless_object_is_given_up_after_twelve_attempts():
    generator, counted = np.random.default_rng(2), np.random.default_rng(2)
    assert jittered_mapping(LONG, 224, 4, generator) is None
    for _ in range(ATTEMPTS):
        counted.standard_normal(2)
        counted.uniform(size=2)
    assert ATTEMPTS == 12
    assert generator.random() == counted.random()


def test_same_generator_same_crop():
    one, other = (jittered_mapping(BOX, 224, 4, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one.scale, other.scale)
    np.testing.assert_array_equal(one.translation, other.translation)
