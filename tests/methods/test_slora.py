"""SLoRA: the chain rule of three factors, its start, counts, its plain LoRA."""

import pytest
import torch

import visionlora as vl
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb, full_gradient
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.slora import SLoRA, SLoRAConfig


def test_the_gradients_are_those_of_the_three_factors():
    model = disturb(adapted_chain("slora", (10, 14), rank=4, alpha=6.0))
    x, goal = torch.randn(5, 10).double(), torch.randn(5, 14).double()
    (model(x) * goal).sum().backward()
    delta = delta_of(model[0])
    g, s = full_gradient(model[0], x, goal), 1.5
    assert_close(delta.B.grad, s * g @ delta.A.t() @ delta.N.t())
    assert_close(delta.N.grad, s * delta.B.t() @ g @ delta.A.t())
    assert_close(delta.A.grad, s * delta.N.t() @ delta.B.t() @ g)


def test_only_the_up_matrix_has_a_gradient_at_first():
    model = adapted_chain("slora", (10, 14), rank=4)
    model(torch.randn(5, 10).double()).sum().backward()
    delta = delta_of(model[0])
    assert bool(delta.B.grad.any())
    assert not delta.A.grad.any()
    assert not delta.N.grad.any()
    assert bool(delta.N.any())  # a middle of zeros would stop A and B for ever


def test_the_middle_is_uniform():
    delta = delta_of(adapted_chain("slora", (64, 64), rank=64)[0])
    assert 0.9 / 8 < float(delta.N.detach().abs().max()) <= 1 / 8
    assert abs(float(delta.N.detach().std()) * 8 * 3**0.5 - 1) < 0.05


def test_it_is_plain_lora_with_the_first_two_factors_multiplied():
    model = disturb(adapted_chain("slora", (10, 14), rank=4, alpha=6.0))
    plain = vl.inject(chain((10, 14)), "lora", targets="0", rank=4, alpha=6.0)
    delta, other = delta_of(model[0]), delta_of(plain[0])
    with torch.no_grad():
        other.A.copy_(delta.A)
        other.B.copy_(delta.B @ delta.N)
    x = torch.randn(5, 10).double()
    assert_close(model(x), plain(x))
    assert int(torch.linalg.matrix_rank(change_of(model[0]))) == 4


def test_counts_and_refusals():
    config = SLoRAConfig(rank=128)
    assert SLoRA.parameter_count(config, 768, 3072) == 128 * (768 + 3072) + 128**2
    # the published surplus over LoRA: 224 projections of a 7B model
    lora = 128 * 2 * 4096
    assert 224 * (SLoRA.parameter_count(config, 4096, 4096) - lora) == 3_670_016
    with pytest.raises(ConfigError, match="rank 11"):
        adapted_chain("slora", (10, 14), rank=11)
