"""LoKr: how dimensions are cut, the product without the matrix, primes, kernels and tokens."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.methods.single_layer import adapt, change, delta_of, inputs, rank, view
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.parts.kronecker import split


@pytest.mark.parametrize(
    ("number", "factor", "parts"),
    [
        (768, None, (24, 32)),
        (192, None, (12, 16)),
        (64, None, (8, 8)),
        (7, None, (1, 7)),
        (1, None, (1, 1)),
        (128, 4, (4, 32)),
        (250, 8, (5, 50)),
        (127, 8, (1, 127)),
        (250, 1000, (10, 25)),
    ],
)
def test_dimensions_are_cut_near_the_root_or_at_the_factor(number, factor, parts):
    assert split(number, factor) == parts


def test_the_count_of_the_running_example():
    delta, config = vl.get_method("lokr").delta, vl.build_config("lokr", {"rank": 8})
    assert delta.parameter_count(config, 768, 768) == 1088


# (out, in), rank: square, tall, wide, primes; rank 64 leaves w2 whole.
SHAPES = [(64, 64), (192, 64), (64, 192), (7, 64), (64, 7), (7, 11)]


@pytest.mark.parametrize("r", [1, 2, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_gives_the_kronecker_product(shape, r):
    model = adapt(nn.Linear(shape[1], shape[0]), "lokr", rank=r, alpha=3.0)
    delta, x = delta_of(model), inputs(5, shape[1])
    second = delta.w2_a @ delta.w2_b if delta.shape.rank else delta.w2
    expected = 3.0 / r * torch.kron(delta.w1, second)
    assert_close(change(model), expected)
    assert_close(model(x), nn.functional.linear(x, view(model) + expected, model[0].bias))


def test_the_product_is_not_formed_where_that_is_cheaper():
    for shape, r, fast in (((64, 64), 2, True), ((64, 64), 64, True), ((7, 11), 64, False)):
        delta = delta_of(adapt(nn.Linear(*shape), "lokr", rank=r))
        assert (delta.update is not None) is fast
        costs, size = delta.shape.costs, shape[0] * shape[1]
        assert (3 * min(costs) < size) is fast


def test_both_orders_of_the_fast_path_are_used():
    orders = set()
    for shape in ((192, 64), (64, 192)):
        delta = delta_of(adapt(nn.Linear(shape[1], shape[0]), "lokr", rank=64))
        assert delta.update is not None
        orders.add(delta.shape.costs[0] <= delta.shape.costs[1])
    assert orders == {True, False}


def test_the_fast_path_serves_slices_attention_and_gradients():
    """The sites of the contract are too small for it; here it runs and matches dense mode."""
    fused = nn.Linear(64, 192), "0[q,v]", lambda model, x: model(x)
    attention = (
        nn.MultiheadAttention(64, 4, batch_first=True),
        "0",
        lambda model, x: model[0](x, x, x, need_weights=False)[0],
    )
    for layer, targets, call in (fused, attention):
        for r in (2, 64):
            base = nn.Sequential(layer).double()
            fast = vl.inject(copy.deepcopy(base), "lokr", targets=targets, rank=r)
            slow = vl.inject(copy.deepcopy(base), "lokr", targets=targets, rank=r, mode="dense")
            deltas = fast[0].adapters["default"].values()
            assert all(delta.update is not None for delta in deltas)
            pairs = list(
                zip(vl.trainable_parameters(fast), vl.trainable_parameters(slow), strict=True)
            )
            with torch.no_grad():
                for (_, one), (_, other) in pairs:
                    one.copy_(torch.randn_like(one))
                    other.copy_(one)
            x = inputs(2, 5, 64)
            mine, expected = call(fast, x), call(slow, x)
            assert_close(mine, expected)
            mine.square().sum().backward()
            expected.square().sum().backward()
            for (_, one), (_, other) in pairs:
                assert_close(one.grad, other.grad, factor=10)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_fast_path_keeps_the_type_of_the_base(autocast):
    base = nn.Sequential(nn.Linear(64, 64))
    model = vl.inject(base if autocast else base.bfloat16(), "lokr", targets="0", rank=2)
    parameter = delta_of(model).w1
    assert delta_of(model).update is not None
    assert parameter.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(torch.randn(3, 64, dtype=torch.float32 if autocast else torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert parameter.grad.dtype == torch.float32


def test_a_prime_layer_is_a_scaled_factor_pair():
    model = adapt(nn.Linear(11, 7), "lokr", rank=2)
    delta = delta_of(model)
    assert delta.w1.shape == (1, 1)
    assert_close(change(model), delta.w1 * (delta.w2_a @ delta.w2_b))
    assert rank(change(model)) == 2


def test_ranks_multiply():
    assert rank(change(adapt(nn.Linear(64, 64), "lokr", rank=2))) == 8 * 2
    assert rank(change(adapt(nn.Linear(64, 64), "lokr", rank=4))) == 8 * 8


@pytest.mark.parametrize("options", [{}, {"groups": 2}])
def test_a_convolution_cuts_its_channels_and_leaves_the_kernel_whole(options):
    model = adapt(nn.Conv2d(12, 12, (2, 3), **options), "lokr", rank=1)
    delta, kernel = delta_of(model), model[0].weight
    channels = kernel.shape[1]
    c, e = split(channels)
    assert (delta.shape.c, delta.shape.e) == (c, e * 6)
    second = (delta.w2_a @ delta.w2_b).reshape(-1, e, 2, 3)
    expected = torch.kron(delta.w1[:, :, None, None], second)
    assert_close(change(model), expected.flatten(1))
    count = sum(item.numel() for item in delta.parameters())
    assert count == delta.site_parameter_count(delta.options, model[0].site("weight"))


def test_tokens_look_up_columns():
    model = adapt(nn.Embedding(10, 6), "lokr", rank=1)
    index = torch.arange(10)
    assert_close(model(index) - model[0].weight, change(model).t())


@pytest.mark.parametrize(
    ("init", "r", "zero"), [("w1", 1, "w1"), ("w2", 1, "w2_b"), ("w2", 8, "w2")]
)
def test_one_part_starts_at_zero(init, r, zero):
    delta = delta_of(adapt(nn.Linear(64, 64), "lokr", rank=r, init=init, random=False))
    for name, part in delta.named_parameters():
        assert bool(part.any()) is (name != zero)
        assert float(part.detach().abs().max()) <= part.shape[1] ** -0.5


def test_bad_options_are_refused():
    for options, message in (({"rank": 0}, "rank"), ({"factor": 0}, "factor")):
        with pytest.raises(ConfigError, match=message):
            vl.build_config("lokr", options)
