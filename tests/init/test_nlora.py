"""NLoRA: columns, rows and their crossing; Nystrom's approximation where it is one."""

import logging

import pytest
import torch

from tests.init.given import given, matrix, product
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
