"""The random starts: their distributions, what of them is zero, and the small core of svd."""

import pytest
import torch

import visionlora as vl
from tests.init.given import given, matrix, product
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, trained_names
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


# -- in a model

METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("dora", {}), ("slora", {}), ("block-lora", {"blocks": 2, "dropout": 0.0})],
)


@METHODS
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "normal", "orthogonal"])
def test_the_change_of_a_model_is_zero_except_for_normal(method, options, init):
    model = adapted_chain(method, (10, 14), rank=4, init=init, **options)
    size = float(change_of(model[0]).abs().max())
    assert size > 1e-5 if init == "normal" else size < 1e-14
    if init in ("kaiming", "gaussian"):
        assert not delta_of(model[0]).B.any()
        assert bool(delta_of(model[0]).A.any())
    again = adapted_chain(method, (10, 14), rank=4, init=init, **options)
    other = adapted_chain(method, (10, 14), rank=4, init=init, seed=1, **options)
    assert torch.equal(delta_of(again[0]).A, delta_of(model[0]).A)
    assert not torch.equal(delta_of(other[0]).A, delta_of(model[0]).A)


@METHODS
def test_kaiming_is_what_happens_without_an_initialiser(method, options):
    one = adapted_chain(method, (10, 14), rank=4, init="kaiming", **options)
    other = adapted_chain(method, (10, 14), rank=4, **options)
    for mine, expected in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_an_orthogonal_start_trains_both_factors_in_the_first_step():
    model = vl.inject(chain((10, 14)), "orthogonal", targets="0", rank=4)
    model(matrix(5, 10)).sum().backward()
    for _, item in vl.trainable_parameters(model):
        assert bool(item.grad.any())


def test_svd_sets_the_core_of_lora_xs_and_nothing_else(tmp_path):
    plain = adapted_chain("lora-xs", (10, 14), rank=4)
    model = vl.inject(chain((10, 14)), "lora-xs+svd(std=0.0)", targets="0", rank=4)
    for name in ("A", "B"):
        assert torch.equal(getattr(delta_of(model[0]), name), getattr(delta_of(plain[0]), name))
    assert not delta_of(model[0]).R.any()
    assert not delta_of(model[0]).carried  # the weight still knows the bases


def test_random_bases_around_a_core_go_into_files(tmp_path):
    model = vl.inject(chain((10, 14)), "lora-xs+kaiming", targets="0", rank=4)
    with torch.no_grad():
        delta_of(model[0]).R.normal_()
    assert trained_names(model) == {"R"}
    x = matrix(5, 10)
    loaded = vl.load(chain((10, 14)), vl.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(model(x), chain((10, 14))(x), atol=1e-3)


def test_an_embedding_starts_with_rows_of_zero():
    for init in ("kaiming", "gaussian"):
        model = torch.nn.Sequential(torch.nn.Embedding(11, 8))
        vl.inject(model, "lora", targets="0", rank=2, init=init)
        assert not delta_of(model[0]).A.any()
        assert bool(delta_of(model[0]).B.any())


@pytest.mark.parametrize("method", ["lora-xs", "lora", "dora", "slora", "block-lora"])
def test_the_report_has_the_size_of_the_first_change(method):
    model = torch.nn.Sequential(torch.nn.Linear(9, 7)).double()
    weight = model[0].weight.detach().clone()
    vl.inject(model, method, "0", rank=2)
    report = vl.initialise(model, "svd" if method == "lora-xs" else "normal", std=0.1)
    vl.merge(model)
    expected = float((model[0].weight - weight).norm() / weight.norm())
    assert report.change["0.weight"] == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-4
