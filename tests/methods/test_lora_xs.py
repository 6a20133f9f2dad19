"""LoRA-XS: singular vectors around a trained core, and files without them."""

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
from visionlora.methods.lora_xs import LoRAXS, LoRAXSConfig


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_the_factors_are_the_best_approximation_with_the_values_on_the_input_side(shape):
    model = adapted_chain("lora-xs", shape, rank=4)
    delta, weight = delta_of(model[0]), model[0].weight
    values = torch.linalg.svdvals(weight)
    assert_close(delta.B.t() @ delta.B, torch.eye(4, dtype=torch.float64))
    assert_close(delta.A @ delta.A.t(), values[:4].square().diag())
    error = (weight - delta.B @ delta.A).square().sum()
    assert_close(error, values[4:].square().sum())


def test_the_gradient_of_the_core_is_the_projected_one():
    model = disturb(adapted_chain("lora-xs", (10, 14), rank=4, alpha=6.0))
    x, goal = torch.randn(5, 10).double(), torch.randn(5, 14).double()
    (model(x) * goal).sum().backward()
    delta = delta_of(model[0])
    g = full_gradient(model[0], x, goal)
    assert_close(delta.R.grad, 1.5 * delta.B.t() @ g @ delta.A.t())
    assert_close(change_of(model[0]), 1.5 * delta.B @ delta.R @ delta.A)


def test_only_the_core_is_trained_and_stored(tmp_path):
    model = adapted_chain("lora-xs", (10, 14), (14, 6), rank=4)
    assert trained_names(model) == {"R"}
    stored = load_file(vl.save(model, tmp_path / "a.safetensors"))
    assert [tuple(item.shape) for item in stored.values()] == [(4, 4), (4, 4)]
    assert not any(".A" in key or ".B" in key for key in model.state_dict())


def test_the_core_starts_near_zero_or_at_zero():
    R = delta_of(adapted_chain("lora-xs", (40, 40), rank=40)[0]).R.detach()
    assert abs(float(R.std()) / 1e-5 - 1) < 0.1
    model = adapted_chain("lora-xs", (10, 14), rank=4, init="zero")
    assert not delta_of(model[0]).R.any()
    model(torch.randn(3, 10).double()).sum().backward()
    assert bool(delta_of(model[0]).R.grad.any())


def test_it_is_plain_lora_with_the_core_in_the_up_matrix():
    model = disturb(adapted_chain("lora-xs", (10, 14), rank=4, alpha=6.0))
    plain = vl.inject(chain((10, 14)), "lora", targets="0", rank=4, alpha=6.0)
    with torch.no_grad():
        delta_of(plain[0]).A.copy_(delta_of(model[0]).A)
        delta_of(plain[0]).B.copy_(delta_of(model[0]).B @ delta_of(model[0]).R)
    x = torch.randn(5, 10).double()
    assert_close(model(x), plain(x))


def test_a_slice_has_the_singular_vectors_of_its_own_rows():
    model = adapted_chain("lora-xs", (8, 24), targets="0[q,v]", rank=3)
    whole = model[0].weight.detach()
    for key, rows in (("q", slice(0, 8)), ("v", slice(16, 24))):
        alone = nn.Sequential(nn.Linear(8, 8)).double()
        with torch.no_grad():
            alone[0].weight.copy_(whole[rows])
        vl.inject(alone, "lora-xs", targets="0", rank=3)
        assert torch.equal(delta_of(model[0], key).A, delta_of(alone[0]).A)
        assert torch.equal(delta_of(model[0], key).B, delta_of(alone[0]).B)


def equal_values(noise):
    """Return a chain whose weight has equal singular values but for some noise."""
    model = chain((12, 12))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        Q = torch.linalg.qr(model[0].weight).Q
        model[0].weight.copy_(Q + noise * torch.randn(12, 12, generator=generator))
    return model


def test_vectors_that_the_weight_does_not_determine_are_recognised(tmp_path):
    model = disturb(vl.inject(equal_values(0.0), "lora-xs", targets="0", rank=9))
    x = torch.randn(3, 12).double()
    path = vl.save(model, tmp_path / "a.safetensors")
    assert torch.equal(vl.load(equal_values(0.0), path)(x), model(x))
    other = equal_values(1e-9)  # the same base model by every figure of the file
    with pytest.raises(AdapterFileError, match="frozen=True"):
        vl.load(other, path)
    path = vl.save(model, tmp_path / "b.safetensors", frozen=True)
    torch.testing.assert_close(vl.load(other, path)(x), model(x), atol=1e-6, rtol=0)


def test_counts_and_refusals():
    # q, k, v, o, fc1, fc2 of 12 blocks
    config = LoRAXSConfig(rank=16)
    sizes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    assert 12 * sum(LoRAXS.parameter_count(config, *size) for size in sizes) == 18_432
    with pytest.raises(ConfigError, match="rank 11"):
        adapted_chain("lora-xs", (10, 14), rank=11)
    broken = chain((4, 4))
    with torch.no_grad():
        broken[0].weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"0\.weight holds NaN or infinity"):
        vl.inject(broken, "lora-xs", targets="0", rank=2)
    assert type(broken[0]) is nn.Linear
