"""CorDA starts as the part of a weight that its inputs use most, or least."""

import dataclasses

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.init.given import best, given, matrix, product
from tests.init.looking import cross_entropy, tower, vectors
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.base import SiteStats
from visionlora.init.corda import CorDA, damped
from visionlora.init.spectral import PiSSA

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
S = 1.5


def inputs(columns, count=40):
    """Correlated inputs of very different sizes."""
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    return matrix(count, columns, seed=2) * scales @ matrix(columns, columns, seed=3)


def site(shape=(12, 10), rank=3, covariance=None, **options):
    if covariance is None:
        x = inputs(shape[1])
        covariance = x.t() @ x / len(x)
    made = given(shape, rank, scale=S, **options)
    return dataclasses.replace(made, stats=SiteStats(covariance=covariance))


def whitening(place, damping=0.01):
    """The damped covariance of a site, of mean diagonal 1."""
    C = place.stats.covariance
    return C / C.diagonal().mean() + damping * torch.eye(len(C), dtype=C.dtype)


@SHAPES
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_at_full_rank_the_pair_is_the_whole_weight(shape, mode):
    place = site(shape, rank=min(shape))
    assert_close(S * product(CorDA(mode=mode).start(place)), place.weight)


@SHAPES
def test_ipm_is_the_best_part_of_the_weight_behind_the_covariance(shape):
    place = site(shape)
    C = whitening(place)
    part = S * product(CorDA().start(place))
    assert_close(part @ C, best(place.weight @ C, 3))
    # PiSSA's part of the same rank leaves more of what these inputs use.
    left = [place.weight - part, place.weight - S * product(PiSSA().start(place))]
    assert (left[0] @ C).norm() < 0.9 * (left[1] @ C).norm()


@SHAPES
def test_kpm_is_what_is_left_when_the_best_part_is_kept(shape):
    place = site(shape)
    C = whitening(place)
    part = S * product(CorDA(mode="kpm").start(place))
    WC = place.weight @ C
    assert_close(part @ C, WC - best(WC, min(shape) - 3))


def test_the_values_are_shared_out_evenly():
    place = site()
    start = CorDA().start(place)
    C = whitening(place)
    assert_close(start.up.t() @ start.up, start.down @ C @ C.t() @ start.down.t())
    assert start.taken_off


def test_white_inputs_make_it_pissa():
    place = site(covariance=7.0 * torch.eye(10, dtype=torch.float64))
    start, other = CorDA().start(place), PiSSA().start(place)
    assert_close(product(start), product(other))
    # The damping of 1 % moves half a percent from A to B.
    assert_close(start.up, 1.01**0.5 * other.up)


def test_the_size_of_the_inputs_does_not_matter():
    place = site()
    other = site(covariance=1e6 * place.stats.covariance)
    start, again = CorDA().start(place), CorDA().start(other)
    assert_close(again.up, start.up)
    assert_close(again.down, start.down)


def test_damping_doubles_until_the_inverse_is_good():
    x = matrix(2, 10)
    singular = x.t() @ x / x.square().sum() * 10
    first = 1e-19
    C, inverse = damped(singular, first)
    identity = torch.eye(10, dtype=torch.float64)
    assert float((C @ inverse - identity).norm()) < 0.05
    added = float((C - singular).diagonal().mean())
    assert 1e-16 < added < 1e-10  # what float64 needs, not more
    sound, _ = damped(singular, 0.01)
    assert_close(sound, singular + 0.01 * identity)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_product_is_that_of_the_reference_rule_for_one_batch(mode):
    x, place = inputs(10), site()
    unit = x / x.max().abs()  # the reference divides every batch by its largest entry
    C = unit.t() @ unit
    C = C + 0.01 * C.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    U, values, V = torch.linalg.svd(place.weight @ C, full_matrices=False)
    chosen = slice(0, 3) if mode == "ipm" else slice(-3, None)
    expected = U[:, chosen] * values[chosen] @ V[chosen] @ torch.linalg.inv(C)
    assert_close(S * product(CorDA(mode=mode).start(place)), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "slora", "block-lora"])
def test_the_function_does_not_change(method):
    model = tower(method).eval()
    x = vectors()[0][0]
    before = model(x)
    vl.initialise(model, "corda", vectors(), cross_entropy)
    assert_close(model(x), before)
    for host in ("qkv", "attn", "conv", "head"):
        for delta in getattr(model, host).adapters["default"].values():
            assert delta.B.any()
            assert delta.A.any()


# -- what is refused


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="damping must be positive"):
        CorDA(damping=0.0)
    with pytest.raises(ConfigError, match="mode must be one of"):
        CorDA(mode="both")
    with pytest.raises(ConfigError, match="positive alpha"):
        vl.initialise(tower(alpha=0.0), "corda", vectors(), cross_entropy)
    for method in ("lora-xs", "lora-fa", "hira"):
        with pytest.raises(ConfigError, match="corda cannot start"):
            vl.initialise(tower(method), "corda", vectors(), cross_entropy)
    with pytest.raises(ConfigError, match="corda looks at data"):
        vl.inject(nn.Linear(8, 3), "lora", init="corda", rank=2)


def test_statistics_that_say_nothing_are_refused():
    zeros = torch.zeros(10, 10, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"all inputs of layer.weight are zero"):
        CorDA().start(site(covariance=zeros))
    with pytest.raises(ConfigError, match=r"covariance of layer.weight holds NaN"):
        CorDA().start(site(covariance=zeros * float("nan")))
    with pytest.raises(ConfigError, match=r"no covariance for layer.weight"):
        CorDA().start(given())


def test_a_part_that_is_not_there_is_refused():
    low = matrix(12, 4) @ matrix(4, 10)
    assert torch.isfinite(CorDA().start(site(weight=low)).up).all()
    with pytest.raises(ConfigError, match="no part of rank 3 in mode kpm: nothing would train"):
        CorDA(mode="kpm").start(site(weight=low))
