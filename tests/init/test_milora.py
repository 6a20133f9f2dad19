"""MiLoRA: what is taken off is the smallest part of the weight."""

import pytest
import torch

from tests.init.given import best, given, matrix, product
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.milora import MiLoRA
from visionlora.init.spectral import PiSSA

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])


@SHAPES
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_what_stays_is_the_best_approximation(shape, scale):
    site = given(shape, 3, scale=scale)
    start = MiLoRA().start(site)
    part = scale * product(start)
    assert_close(site.weight - part, best(site.weight, min(shape) - 3))
    assert_close(part.norm(), torch.linalg.svdvals(site.weight)[-3:].norm())
    assert_close(start.up.t() @ start.up, start.down @ start.down.t())
    assert start.taken_off


@SHAPES
def test_at_full_rank_it_is_pissa(shape):
    site = given(shape, min(shape))
    assert_close(product(MiLoRA().start(site)), product(PiSSA().start(site)))


def test_a_weight_with_nothing_there_is_refused():
    low = matrix(12, 4) @ matrix(4, 10)
    with pytest.raises(ConfigError, match=r"layer\.weight has no part in its 3 smallest"):
        MiLoRA().start(given(weight=low))
    start = MiLoRA().start(given(weight=low, rank=8))  # two of these eight are there
    assert_close(low - 1.5 * product(start), best(low, 2))
    with pytest.raises(ConfigError, match="holds NaN"):
        MiLoRA().start(given(weight=low / 0))
