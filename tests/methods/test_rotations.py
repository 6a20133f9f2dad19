"""OFT and BOFT: orthogonality, what it preserves, butterflies as matrices, and which blocks fit."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.methods.single_layer import adapt, change, delta_of, inputs, view
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.parts.rotations import (
    cayley,
    cayley_series,
    rotate_blocks,
    rotate_butterfly,
    skew,
)

LAYERS = [
    nn.Linear(16, 12),
    nn.Linear(8, 12),
    nn.Conv2d(4, 6, 2),
    nn.Conv2d(8, 8, 4, groups=8),
    nn.Embedding(11, 8),
]


def rotations(count, block):
    return cayley(skew(inputs(count, block * (block - 1) // 2), block))


def test_skew_is_the_triangle_row_by_row():
    matrix = skew(torch.tensor([[1.0, 2.0, 3.0]]), 3)
    assert torch.equal(matrix[0], torch.tensor([[0, 1.0, 2.0], [-1.0, 0, 3.0], [-2.0, -3.0, 0]]))


def test_the_cayley_transform_is_a_rotation():
    R = rotations(3, 4)
    assert_close(R @ R.mT, torch.eye(4).double().expand(3, 4, 4))
    assert_close(torch.linalg.det(R), torch.ones(3).double())
    assert torch.equal(cayley(torch.zeros(1, 4, 4)), torch.eye(4)[None])


def test_the_series_agrees_up_to_fourth_order():
    Q = skew(inputs(2, 6), 4)
    errors = [
        float((cayley_series(scale * Q) - cayley(scale * Q)).norm()) for scale in (2e-2, 1e-2)
    ]
    assert 14 < errors[0] / errors[1] < 18


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"share": True}])
def test_oft_keeps_singular_values_and_row_norms(layer, options):
    model = adapt(layer, "oft", block=4, **options)
    weight, changed = view(model), view(model) + change(model)
    assert float(change(model).norm()) > 0.1
    assert_close(torch.linalg.svdvals(changed), torch.linalg.svdvals(weight))
    dimension = 0 if isinstance(layer, nn.Embedding) else 1  # the rotated one
    assert_close(changed.norm(dim=dimension), weight.norm(dim=dimension))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_boft_keeps_singular_values_under_its_scales(layer, depth):
    model = adapt(layer, "boft", block=2, depth=depth)
    with torch.no_grad():
        delta_of(model).s.fill_(1.5)
    changed = view(model) + change(model)
    assert_close(torch.linalg.svdvals(changed), 1.5 * torch.linalg.svdvals(view(model)))


def test_oft_rotates_the_input_of_a_linear_layer():
    model, x = adapt(nn.Linear(16, 12), "oft", block=4), inputs(5, 16)
    delta = delta_of(model)
    R = torch.block_diag(*delta.rotation())
    assert_close(delta.rotate(x), x @ R.t())
    assert_close(change(model), view(model) @ R - view(model))
    assert_close(model(x), nn.functional.linear(x @ R.t(), model[0].weight, model[0].bias))


def test_a_shared_rotation_is_the_same_in_every_block():
    model = adapt(nn.Linear(16, 12), "oft", block=4, share=True)
    R = torch.block_diag(*[delta_of(model).rotation()[0]] * 4)
    assert_close(change(model), view(model) @ R - view(model))
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 6


def test_an_embedding_rotates_its_output():
    for method, options in (("oft", {"block": 4}), ("boft", {"block": 2, "depth": 2})):
        model = adapt(nn.Embedding(11, 8), method, **options)
        index = torch.tensor([[3, 0], [10, 3]])
        assert_close(model(index), (view(model) + change(model)).t()[index])


def permutation(features, block, level):
    """Where each feature comes from: the halves of a block lie 2^level half-blocks apart."""
    half, order = block // 2, []
    for start in range(0, features, block * 2**level):
        for k in range(2**level):
            for side in range(2):
                first = start + (side * 2**level + k) * half
                order.extend(range(first, first + half))
    return torch.eye(features).double()[order]


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_butterfly_is_a_permuted_block_diagonal(block, level):
    R, x = rotations(16 // block, block), inputs(5, 16)
    P = permutation(16, block, level)
    matrix = P.t() @ torch.block_diag(*R) @ P
    assert_close(rotate_butterfly(x, R, level), x @ matrix.t())
    back = rotate_butterfly(rotate_butterfly(x, R, level), R.mT, level)
    assert_close(back, x)


@pytest.mark.parametrize(("block", "depth"), [(2, 1), (2, 2), (2, 3), (4, 2), (4, 3)])
def test_each_rotation_doubles_what_a_feature_meets(block, depth):
    layer = nn.Linear(16, 16)
    model = adapt(layer, "boft", block=block, depth=depth)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
    changed = view(model) + change(model)
    met = (changed.abs() > 1e-12).sum(1)
    assert bool((met == block * 2 ** (depth - 1)).all())


def test_one_rotation_is_oft_with_a_scale():
    one = adapt(nn.Linear(16, 12), "boft", block=4, depth=1)
    other = adapt(nn.Linear(16, 12), "oft", block=4)
    with torch.no_grad():
        delta_of(other).Q.copy_(delta_of(one).Q[0])
    scale = delta_of(one).s.detach()[:, None]
    assert_close(view(one) + change(one), scale * (view(other) + change(other)))


def test_the_bias_is_not_scaled():
    model, x = adapt(nn.Linear(16, 12), "boft", block=4), inputs(5, 16)
    with torch.no_grad():
        delta_of(model).s.zero_()
    assert_close(model(x), model[0].bias.expand(5, 12))


def test_one_block_serves_all_runs():
    R, x = rotations(1, 4), inputs(5, 12)
    assert_close(rotate_blocks(x, R), rotate_blocks(x, R.expand(3, 4, 4)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("oft", {"block": 5}, "5 and 16 features"),
        ("oft", {"block": 32}, "32 and 16 features"),
        ("oft", {"block": 1}, "at least 2"),
        ("boft", {"block": 8, "depth": 3}, "32 and 16 features"),
        ("boft", {"block": 3, "depth": 2}, "even"),
        ("boft", {"block": 1}, "at least 2"),
        ("boft", {"depth": 0}, "depth"),
        ("boft", {"depth": 10**6}, "depth 1000000 and 16 features"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(nn.Linear(16, 12), method, **options)


def test_counts():
    for method, options, count in (
        ("oft", {}, 24 * 32 * 31 // 2),
        ("oft", {"share": True}, 32 * 31 // 2),
        ("boft", {}, 2 * 96 * 28 + 768),
    ):
        config = vl.build_config(method, options)
        assert vl.get_method(method).delta.parameter_count(config, 768, 768) == count
