"""The random starts: their distributions, what of them is zero, and the small core of svd."""

import pytest
import torch

from tests.init.given import given, matrix, product
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.random import Gaussian, Kaiming, Normal, Orthogonal
from visionlora.init.svd import SVD

DRAWN = [Gaussian(), Normal(), Orthogonal(), SVD()]


def near(values, std, mean=0.0):
    """Compare mean and standard deviation with four standard errors."""
    n = values.numel() ** 0.5
    return abs(float(values.mean()) - mean) < 4 * std / n and abs(
        float(values.std()) - std
    ) < 4 * std / (2**0.5 * n)


def test_kaiming_is_the_start_of_the_method():
    for form in ("pair", "rescaled", "blocks", "middle"):
        start = Kaiming().start(given(form=form))
        assert start.up is start.down is start.core is None


def test_kaiming_draws_both_bases_around_a_core():
    start = Kaiming().start(given((60, 80), 16, "core"))
    for values, bound in ((start.up, 16**-0.5), (start.down, 80**-0.5)):
        assert 0.95 * bound < float(values.abs().max()) <= bound
        assert near(values, bound / 3**0.5)
    assert start.core is None


def test_gaussian_has_deviation_one_over_the_rank_on_one_side():
    start = Gaussian().start(given((20, 200), 8))
    assert near(start.down, 1 / 8)
    assert start.up is None  # zero, as every method has it


def test_an_embedding_keeps_its_own_start():
    start = Gaussian().start(given(kind="embedding"))
    assert start.up is start.down is None


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_normal_has_the_same_deviation_on_both_sides(std):
    start = Normal(std=std).start(given((100, 120), 8))
    assert near(start.up, std)
    assert near(start.down, std)
    assert Normal().std == 0.02


@pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
@pytest.mark.parametrize("rank", [2, 6])
def test_orthogonal_factors_have_no_product(shape, rank):
    start = Orthogonal().start(given(shape, rank))
    assert float(product(start).abs().max()) < 1e-15
    assert int(torch.linalg.matrix_rank(start.up)) == rank // 2
    assert int(torch.linalg.matrix_rank(start.down)) == rank // 2
    # both have a gradient at once
    g = matrix(*shape)
    assert float((start.up.t() @ g).norm()) > 0.1
    assert float((g @ start.down.t()).norm()) > 0.1


def test_the_orthogonal_entries_have_the_published_size():
    start = Orthogonal().start(given((400, 300), 8))
    # each entry sums r/2 normals whose weights have a mean square of 1/r
    for values in (start.up, start.down):
        assert abs(float(values.square().mean()) - 0.01 / 2) < 0.001


def test_an_odd_rank_has_no_halves():
    with pytest.raises(ConfigError, match=r"rank must be even.* got 3 at layer\.weight"):
        Orthogonal().start(given(rank=3))


@pytest.mark.parametrize("std", [1e-5, 0.0])
@pytest.mark.parametrize("form", ["core", "middle"])
def test_svd_is_a_small_core_between_singular_vectors(std, form):
    site = given((60, 50), 30, form)
    start = SVD(std=std).start(site)
    if std:
        assert near(start.core, std)
    else:
        assert not start.core.any()
    if form == "core":
        assert start.up is start.down is None  # the method's own
    else:
        U, S, V = torch.linalg.svd(site.weight, full_matrices=False)
        assert_close(start.up @ start.down, U[:, :30] * S[:30] @ V[:30])
        assert_close(start.up.t() @ start.up, torch.eye(30, dtype=torch.float64))


@pytest.mark.parametrize("init", DRAWN, ids=lambda item: item.name)
def test_the_draw_follows_the_seed_and_leaves_the_global_generator(init):
    state = torch.random.get_rng_state()
    form = "core" if isinstance(init, SVD) else "pair"
    one, again, other = (init.start(given(rank=4, form=form, seed=n)) for n in (0, 0, 1))
    for name in ("up", "down", "core"):
        values = [getattr(item, name) for item in (one, again, other)]
        if values[0] is not None:
            assert torch.equal(values[0], values[1])
            assert not torch.equal(values[0], values[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("make", [lambda: Normal(std=0.0), lambda: SVD(std=-1.0)])
def test_impossible_deviations_are_refused(make):
    with pytest.raises(ConfigError, match="std must"):
        make()
