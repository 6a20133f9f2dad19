"""MiLoRA: what is taken off is the smallest part of the weight."""

import pytest
import torch

import visionlora as vl
from tests.init.given import best, given, matrix, product
from tests.methods.chains import adapted_chain, chain, delta_of
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


def test_a_model_keeps_its_function_and_a_slice_is_decomposed_on_its_own():
    model = chain((8, 24))
    x, weight = matrix(5, 8), model[0].weight.detach().clone()
    expected = model(x)
    vl.inject(model, "milora", targets="0[q,v]", rank=3)
    assert torch.equal(model(x), expected)
    for key, rows in (("q", slice(0, 8)), ("v", slice(16, 24))):
        delta = delta_of(model[0], key)
        assert_close(delta.B0 @ delta.A0, weight[rows] - best(weight[rows], 5))


@pytest.mark.parametrize("alpha", [0.0, -2.0])
def test_a_scale_without_a_root_is_refused(alpha):
    with pytest.raises(ConfigError, match="milora needs a positive alpha"):
        adapted_chain("milora", (8, 8), rank=3, alpha=alpha)
