"""NLoRA: columns, rows and their crossing; Nystrom's approximation where it is one."""

import logging

import pytest
import torch

import visionlora as vl
from tests.init.given import given, matrix, product
from tests.methods.chains import (
    adapted_chain,
    chain,
    change_of,
    delta_of,
    disturb,
    full_gradient,
    trained_names,
)
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.nlora import NLoRA

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
INDEX = pytest.mark.parametrize("index", ["first", "random", "norm"])


def chosen(part, whole):
    """Return which rows of `whole` the rows of `part` are."""
    return [int((whole == row).all(1).nonzero()) for row in part]


@SHAPES
@INDEX
@pytest.mark.parametrize("form", ["middle", "core"])
def test_the_raw_factors_are_slices(shape, index, form):
    site = given(shape, 4, form)
    start = NLoRA(index=index).start(site)
    rows, columns = chosen(start.down, site.weight), chosen(start.up.t(), site.weight.t())
    assert rows == sorted(set(rows))
    assert columns == sorted(set(columns))
    assert torch.equal(start.core, site.weight[rows][:, columns])
    assert not start.taken_off
    if index == "first":
        assert rows == columns == [0, 1, 2, 3]
    if index == "norm":
        norms = site.weight.norm(dim=1)
        others = [i for i in range(shape[0]) if i not in rows]
        assert float(norms[rows].min()) >= float(norms[others].max())


@SHAPES
@INDEX
def test_with_the_pseudo_inverse_rows_and_columns_are_exact(shape, index, caplog):
    caplog.set_level(logging.CRITICAL)
    site = given(shape, 4, "middle")
    start = NLoRA(index=index, intermediate="pinv", residual=True).start(site)
    rows, columns = chosen(start.down, site.weight), chosen(start.up.t(), site.weight.t())
    approximation = product(start)
    assert_close(approximation[rows], site.weight[rows], factor=10)
    assert_close(approximation[:, columns], site.weight[:, columns], factor=10)
    assert not torch.allclose(approximation, site.weight, atol=1e-3)
    assert start.taken_off


@SHAPES
@INDEX
def test_a_weight_of_that_rank_is_its_own_approximation(shape, index):
    weight = matrix(shape[0], 3) @ matrix(3, shape[1], seed=5)
    start = NLoRA(index=index, intermediate="pinv", residual=True).start(
        given(rank=3, form="middle", weight=weight)
    )
    assert_close(product(start), weight, factor=100)


def test_a_random_choice_follows_the_seed():
    first, again, other = (
        NLoRA(index="random").start(given(form="middle", seed=seed)) for seed in (0, 0, 3)
    )
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)


def test_the_pseudo_inverse_must_be_taken_off():
    with pytest.raises(ConfigError, match="'pinv' needs residual=True"):
        NLoRA(intermediate="pinv")


def test_a_part_that_outweighs_the_weight_is_named(caplog):
    """Nystrom's approximation of a weight without structure is larger than the weight."""
    wild, tame = matrix(40, 40), matrix(40, 4) @ matrix(4, 40, seed=2)
    start = NLoRA(intermediate="pinv", residual=True)
    start.start(given(weight=tame, rank=4, form="middle", scale=0.9))
    NLoRA(residual=True).start(given(weight=0.01 * wild, rank=4, form="middle"))
    assert not caplog.records
    made = start.start(given(weight=wild, rank=20, form="middle", scale=1.0))
    assert float(product(made).norm()) > float(wild.norm())
    assert [item.levelname for item in caplog.records] == ["WARNING"]
    assert "layer.weight" in caplog.text


@pytest.mark.parametrize("intermediate", ["raw", "pinv"])
def test_a_core_alone_starts_at_zero_where_nothing_may_change(intermediate, caplog):
    site = given(form="core")
    start = NLoRA(intermediate=intermediate, residual=True).start(site)
    assert not start.core.any()
    assert not start.taken_off
    assert not caplog.records
    assert torch.equal(start.up, site.weight[:, :3])
    assert torch.equal(start.down, site.weight[:3])


def test_a_weight_with_nan_is_refused():
    with pytest.raises(ConfigError, match=r"nlora: the weight of layer\.weight holds NaN"):
        NLoRA().start(given(weight=matrix(6, 6) / 0, form="middle"))


# -- in a model


@INDEX
@pytest.mark.parametrize("method", ["slora", "lora-xs"])
def test_without_taking_off_the_function_differs_by_the_product(method, index):
    model = chain((10, 14))
    weight = model[0].weight.detach().clone()
    vl.inject(model, method, targets="0", rank=4, alpha=2.0)
    report = vl.initialise(model, "nlora", index=index)
    delta = delta_of(model[0])
    core = delta.N if method == "slora" else delta.R
    change = 0.5 * delta.B.detach() @ core.detach() @ delta.A.detach()
    assert_close(change_of(model[0]), change)
    assert report.change["0.weight"] == pytest.approx(float(change.norm() / weight.norm()))
    assert float(change.norm()) > 1e-3
    assert torch.equal(model[0].weight.detach(), weight)
    x = matrix(5, 10)
    assert_close(model(x), chain((10, 14))(x) + x @ change.t())


@pytest.mark.parametrize("options", [{}, {"residual": True}])
def test_the_gradients_are_those_of_the_three_factors(options):
    model = adapted_chain("slora", (10, 14), rank=4, alpha=6.0)
    vl.initialise(model, "nlora", **options)
    disturb(model, 0.1)
    x, goal = matrix(5, 10), matrix(5, 14, seed=2)
    (model(x) * goal).sum().backward()
    delta, g, s = delta_of(model[0]), full_gradient(model[0], x, goal), 1.5
    assert_close(delta.B.grad, s * g @ delta.A.t() @ delta.N.t())
    assert_close(delta.N.grad, s * delta.B.t() @ g @ delta.A.t())
    assert_close(delta.A.grad, s * delta.N.t() @ delta.B.t() @ g)


@pytest.mark.parametrize("residual", [False, True])
def test_inttune_trains_the_core_alone(residual, tmp_path):
    model = vl.inject(chain((10, 14)), f"inttune(residual={residual})", targets="0", rank=4)
    assert trained_names(model) == {"R"}
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 16
    delta, weight = delta_of(model[0]), model[0].weight.detach()
    assert torch.equal(delta.B, weight[:, :4])
    assert torch.equal(delta.A, weight[:4])
    x = matrix(5, 10)
    if residual:
        assert torch.equal(model(x), chain((10, 14))(x))
    model(x).sum().backward()
    assert bool(delta.R.grad.any())
    disturb(model)
    loaded = vl.load(chain((10, 14)), vl.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(loaded(x), model(x))


def test_the_three_factors_are_plain_lora(tmp_path):
    model = disturb(vl.inject(chain((10, 14)), "nlora", targets="0", rank=4), 0.1)
    delta, x = delta_of(model[0]), matrix(5, 10)
    plain = vl.inject(chain((10, 14)), "lora", targets="0", rank=4)
    with torch.no_grad():
        delta_of(plain[0]).B.copy_(delta.B @ delta.N)
        delta_of(plain[0]).A.copy_(delta.A)
    assert_close(plain(x), model(x))
    report = vl.export(model, tmp_path / "a.safetensors", format="lora")
    assert set(report.ranks.values()) == {4}
    assert_close(vl.load(chain((10, 14)), report)(x), model(x))


def test_a_second_adapter_has_a_middle_of_its_own():
    model = vl.inject(chain((10, 14)), "nlora", targets="0", rank=4)
    vl.inject(model, "nlora(residual=True)", targets="0", rank=2, name="second")
    one, two = (model[0].adapters[name]["weight"] for name in ("default", "second"))
    assert one.N.shape == (4, 4)
    assert two.N.shape == (2, 2)
    # it is cut out of the frozen weight, not out of what the first adapter makes of it
    assert torch.equal(two.N.detach(), model[0].weight.detach()[:2, :2])


@pytest.mark.parametrize("preset", ["nlora", "inttune"])
def test_a_rank_beyond_the_weight_is_refused(preset):
    with pytest.raises(ConfigError, match="rank 11"):
        vl.inject(chain((10, 14)), preset, targets="0", rank=11)
