"""LoLDU: the published form, its gradient, counts, singular weights, other pivots."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import visionlora as vl
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
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.methods.loldu import LoLDU, LoLDUConfig

SHAPES = pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9)])
INITS = ("constant", "normal", "uniform", "s_normal", "s_uniform", "ones", "zeros")


@SHAPES
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"train_scale": True, "alpha": 4.0}])
def test_it_starts_at_the_frozen_weight_exactly(shape, options):
    base, x = chain(shape), torch.randn(3, shape[0]).double()
    model = vl.inject(chain(shape), "loldu", targets="0", **options)
    assert torch.equal(model(x), base(x))


@SHAPES
@pytest.mark.parametrize("train_scale", [False, True])
@pytest.mark.parametrize("rank", [None, 5])
def test_it_is_the_published_form_around_a_residual(shape, rank, train_scale):
    options = {"rank": rank, "alpha": 4.0, "train_scale": train_scale}
    model = disturb(adapted_chain("loldu", shape, **options))
    delta, W = delta_of(model[0]), model[0].weight
    permutation, lower, upper = torch.linalg.lu(W)
    d = upper.diagonal().clone()
    r = len(delta.z)
    left, U = (permutation @ lower)[:, :r], (upper / d[:, None])[:r]
    s_0 = 4.0 / r
    s = delta.s if train_scale else s_0
    residual = W - s_0 * left @ d[:r].diag() @ U
    x = torch.randn(4, shape[0]).double()
    expected = x @ (residual + s * left @ delta.z.diag() @ U).t() + model[0].bias
    assert_close(model(x), expected)


@SHAPES
def test_at_full_rank_scaling_all_pivots_scales_the_weight(shape):
    model = adapted_chain("loldu", shape)
    delta = delta_of(model[0])
    assert len(delta.z) == min(shape)
    with torch.no_grad():
        delta.z.copy_(3 * delta.d)
    assert_close(model[0].weight + change_of(model[0]), 3 * model[0].weight)


def test_the_gradient_is_the_written_one():
    model = disturb(adapted_chain("loldu", (10, 14), rank=6, alpha=9.0, train_scale=True))
    x, goal = torch.randn(5, 10).double(), torch.randn(5, 14).double()
    (model(x) * goal).sum().backward()
    delta, G = delta_of(model[0]), full_gradient(model[0], x, goal)
    along = torch.stack([delta.L[:, i] @ G @ delta.U[i] for i in range(6)])
    assert_close(delta.z.grad, delta.s * along)
    assert_close(delta.s.grad, (delta.z * along).sum()[None])


def test_only_the_pivots_are_trained_and_nothing_decays():
    model = adapted_chain("loldu", (10, 14), (14, 6))
    assert trained_names(model) == {"z"}
    both = adapted_chain("loldu", (10, 14), train_scale=True)
    assert trained_names(both) == {"z", "s"}
    both(torch.randn(2, 10).double()).sum().backward()
    assert bool(delta_of(both[0]).s.grad.any())  # from the first step on
    for group in vl.parameter_groups(both, 1e-2, 0.1):
        assert group["weight_decay"] == 0.0


def attention(width, text, blocks):
    """Return the views of self- and cross-attention of some transformer blocks."""
    own = [(width, width)] * 6  # q, k, v, out of the first and q, out of the second
    return (own + [(width, text)] * 2) * blocks


def test_counts():
    config = LoLDUConfig()
    assert 24 * LoLDU.parameter_count(config, 768, 768) == 18_432
    assert LoLDU.parameter_count(LoLDUConfig(rank=5, train_scale=True), 768, 768) == 6
    sd = attention(320, 768, 5) + attention(640, 768, 5) + attention(1280, 768, 6)
    assert sum(LoLDU.parameter_count(config, *size) for size in sd) == 93_696
    sdxl = attention(640, 2048, 10) + attention(1280, 2048, 60)
    assert sum(LoLDU.parameter_count(config, *size) for size in sdxl) == 665_600


@pytest.mark.parametrize("init", INITS)
def test_other_initial_values_follow_their_law_and_change_the_weight(init):
    model = adapted_chain("loldu", (400, 400), init=init)
    delta = delta_of(model[0])
    z, d = delta.z.detach(), delta.d
    mean, spread, bound = float(d.mean()), float(d.std()), abs(float(d.mean())) / 2
    expected = {
        "constant": (mean, 0.0),
        "normal": (mean, spread),
        "uniform": (0.0, bound / 3**0.5),
        "s_normal": (0.0, 1.0),
        "s_uniform": (0.0, 3**-0.5),
        "ones": (1.0, 0.0),
        "zeros": (0.0, 0.0),
    }[init]
    assert abs(float(z.mean()) - expected[0]) < 0.2 * expected[1] + 1e-6
    assert abs(float(z.std()) - expected[1]) < 0.1 * expected[1] + 1e-6
    assert not delta.zero_at_init
    change = change_of(model[0])
    assert_close(change, delta.L * (z - d) @ delta.U)
    assert bool(change.any())


def test_a_singular_weight_is_finite_and_starts_unchanged():
    model = chain((6, 6))
    with torch.no_grad():
        model[0].weight[3:] = model[0].weight[:3]
    x = torch.randn(4, 6).double()
    expected = model(x)
    vl.inject(model, "loldu", targets="0")
    assert torch.equal(model(x), expected)
    delta = delta_of(model[0])
    assert bool((delta.d == 1).any())
    disturb(model)(x).sum().backward()
    assert bool(torch.isfinite(model(x)).all())
    assert bool(torch.isfinite(delta.z.grad).all())


def test_merging_and_plain_lora_give_the_same_numbers():
    model = disturb(adapted_chain("loldu", (10, 14), rank=6))
    delta, x = delta_of(model[0]), torch.randn(5, 10).double()
    expected, before = model(x), model[0].weight.clone()
    with vl.merged(model):
        assert_close(model(x), expected)
    assert torch.equal(model[0].weight, before)
    plain = vl.inject(chain((10, 14)), "lora", targets="0", rank=6)
    with torch.no_grad():
        delta_of(plain[0]).A.copy_(delta.U)
        delta_of(plain[0]).B.copy_(delta.L * (delta.z - delta.d))
    assert_close(plain(x), expected)


def tied_pivots(noise):
    """Return a chain where elimination comes late to a choice between two equal pivots."""
    model = chain((10, 12))
    with torch.no_grad():
        weight = model[0].weight
        weight[:8, 8:] = 0
        weight[8:, :8] = 0
        weight[8:, 8] = torch.tensor([1.0, 1.0 + noise, 0.2, 0.4], dtype=torch.float64)
        weight[8:, 9] = torch.tensor([0.3, -0.5, 0.1, 0.7])
    return model


def test_a_file_holds_the_pivots_only_and_another_permutation_is_refused(tmp_path):
    model = disturb(vl.inject(tied_pivots(1e-9), "loldu", targets="0"))
    x = torch.randn(3, 10).double()
    path = vl.save(model, tmp_path / "a.safetensors")
    assert [tuple(item.shape) for item in load_file(path).values()] == [(10,)]
    assert torch.equal(vl.load(tied_pivots(1e-9), path)(x), model(x))
    other = tied_pivots(-1e-9)  # the same base model by every figure of the file
    order = delta_of(vl.inject(tied_pivots(-1e-9), "loldu", targets="0")[0]).L
    assert not torch.allclose(order, delta_of(model[0]).L, atol=1e-3)
    with pytest.raises(AdapterFileError, match="frozen=True"):
        vl.load(other, path)
    assert type(other[0]) is nn.Linear
    path = vl.save(model, tmp_path / "b.safetensors", frozen=True)
    torch.testing.assert_close(vl.load(other, path)(x), model(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"rank 9.*8 x 12.*at most 8"),
        ({"rank": 0}, "rank must be at least 1 or None"),
        ({"alpha": 0.0}, "alpha must not be 0"),
        ({"dropout": -0.1}, "dropout must lie"),
        ({"init": "svd"}, "init must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        adapted_chain("loldu", (12, 8), **options)
