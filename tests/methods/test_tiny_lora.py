"""TinyLoRA: coefficients of frozen directions, tied over groups of sites."""

import pytest
import torch
from safetensors.torch import load_file

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
from visionlora.methods.tiny_lora import TinyLoRAConfig, TinyVectors
from visionlora.record import SHARED

FOUR = ((6, 8), (8, 8), (8, 8), (8, 6))


def vectors_of(model):
    return getattr(model, SHARED)["default"]


def test_the_change_is_linear_in_the_coefficients():
    model = disturb(adapted_chain("tiny-lora", (10, 14), rank=3, coefficients=5))
    delta, v = delta_of(model[0]), vectors_of(model).v[0]
    core = sum(value * P for value, P in zip(v, delta.P, strict=True))
    assert_close(change_of(model[0]), delta.B @ core @ delta.A)


def test_the_factors_share_the_singular_values():
    model = adapted_chain("tiny-lora", (10, 14), rank=3)
    delta = delta_of(model[0])
    values = torch.linalg.svdvals(model[0].weight)[:3].diag()
    assert_close(delta.A @ delta.A.t(), values)
    assert_close(delta.B.t() @ delta.B, values)


def test_the_gradient_is_the_projection_on_the_directions():
    model = disturb(adapted_chain("tiny-lora", (10, 14), rank=3, coefficients=5))
    x, goal = torch.randn(5, 10).double(), torch.randn(5, 14).double()
    (model(x) * goal).sum().backward()
    delta = delta_of(model[0])
    core = delta.B.t() @ full_gradient(model[0], x, goal) @ delta.A.t()
    assert_close(vectors_of(model).v.grad[0], (delta.P * core).sum((1, 2)))


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, [0, 1, 2, 3]), (0.5, [0, 0, 1, 1]), (1.0, [0, 0, 0, 0])]
)
def test_tying_cuts_the_sites_into_groups(tying, groups):
    model = adapted_chain("tiny-lora", *FOUR, coefficients=5, weight_tying=tying)
    vectors = vectors_of(model)
    assert list(vectors.group.values()) == groups
    assert vectors.v.shape == (max(groups) + 1, 5)
    assert trained_names(model) == {"v"}
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 5 * (max(groups) + 1)
    sites = [layer.state.sites["default"]["weight"] for layer in model[:4]]
    config = TinyLoRAConfig(coefficients=5, weight_tying=tying)
    assert TinyVectors.parameter_count(config, sites) == vectors.v.numel()


def test_the_gradient_of_a_shared_vector_is_the_sum_over_its_sites():
    tied = disturb(adapted_chain("tiny-lora", *FOUR, coefficients=5, weight_tying=0.5))
    free = adapted_chain("tiny-lora", *FOUR, coefficients=5)
    with torch.no_grad():
        vectors_of(free).v.copy_(vectors_of(tied).v[[0, 0, 1, 1]])
    x = torch.randn(3, 6).double()
    for model in (tied, free):
        model(x).square().sum().backward()
    assert_close(vectors_of(tied).v.grad, vectors_of(free).v.grad.view(2, 2, 5).sum(1), factor=10)


def test_initial_values():
    model = adapted_chain("tiny-lora", (20, 20), rank=20, coefficients=400)
    v, P = vectors_of(model).v.detach(), delta_of(model[0]).P
    assert 0.019 < float(v.abs().max()) <= 0.02
    assert abs(float(P.var()) * 20 - 1) < 0.02
    zero = adapted_chain("tiny-lora", (6, 8), init="zero")
    assert not vectors_of(zero).v.any()
    zero(torch.randn(2, 6).double()).sum().backward()
    assert bool(vectors_of(zero).v.grad.any())


def test_sites_have_directions_of_their_own():
    model = adapted_chain("tiny-lora", (8, 8), (8, 8))
    assert not torch.equal(delta_of(model[0]).P, delta_of(model[1]).P)


def test_files_hold_the_vectors_and_check_the_rest(tmp_path):
    options = {"coefficients": 5, "weight_tying": 0.5}
    model = disturb(adapted_chain("tiny-lora", *FOUR, **options))
    x = torch.randn(3, 6).double()
    path = vl.save(model, tmp_path / "a.safetensors")
    assert [tuple(item.shape) for item in load_file(path).values()] == [(2, 5)]
    assert torch.equal(vl.load(chain(*FOUR), path)(x), model(x))
    other = vl.inject(chain(*FOUR), "tiny-lora", targets="type:Linear", seed=1, **options)
    with pytest.raises(AdapterFileError, match="frozen=True"):
        vl.load(other, path)
    path = vl.save(model, tmp_path / "b.safetensors", frozen=True)
    assert torch.equal(vl.load(other, path)(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, r"rank 7.*8 x 6.*at most 6"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"coefficients": 0}, "coefficients must be at least 1"),
        ({"weight_tying": 1.5}, r"weight_tying must lie in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        adapted_chain("tiny-lora", (6, 8), **options)
