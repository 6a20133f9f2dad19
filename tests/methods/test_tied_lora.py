"""Tied-LoRA: one trained pair per shape, two trained vectors per site."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.tied_lora import TiedLoRAConfig, TiedPairs
from visionlora.record import SHARED

SHAPES = ((6, 10), (10, 6), (6, 10), (10, 6), (6, 6))


def pairs_of(model):
    return getattr(model, SHARED)["default"]


def test_the_change_is_the_scaled_product_of_the_shape_s_pair():
    model = disturb(adapted_chain("tied-lora", *SHAPES, rank=3, alpha=6.0))
    pairs = pairs_of(model)
    assert {name: tuple(item.shape) for name, item in pairs.A.items()} == {
        "10x6": (3, 6),
        "6x10": (3, 10),
        "6x6": (3, 6),
    }
    for layer in model[:5]:
        delta = delta_of(layer)
        A, B = pairs.A[delta.shape], pairs.B[delta.shape]
        expected = 2.0 * delta.u.diag() @ B @ delta.v.diag() @ A
        assert_close(change_of(layer), expected)


def test_the_gradient_of_a_tied_pair_is_the_sum_over_its_sites():
    model = disturb(adapted_chain("tied-lora", *SHAPES, rank=3))
    x = torch.randn(4, 6).double()
    model(x).square().sum().backward()
    # the same function with a pair of its own in every layer
    pairs = pairs_of(model)
    own = {}
    weights = {}
    for index, layer in enumerate(model[:5]):
        delta = delta_of(layer)
        A, B = (part[delta.shape].detach().clone().requires_grad_() for part in (pairs.A, pairs.B))
        own.setdefault(delta.shape, []).append((A, B))
        change = delta.u.detach()[:, None] * B * delta.v.detach() @ A
        weights[f"{index}.weight"] = layer.weight + change
    torch.func.functional_call(chain(*SHAPES), weights, (x,)).square().sum().backward()
    for shape, items in own.items():
        assert_close(pairs.A[shape].grad, sum(A.grad for A, _ in items), factor=100)
        assert_close(pairs.B[shape].grad, sum(B.grad for _, B in items), factor=100)


def test_it_starts_as_a_lora_whose_pair_is_shared():
    model = adapted_chain("tied-lora", (8, 8), (8, 8), rank=2)
    for layer in model[:2]:
        assert bool((delta_of(layer).u == 1).all())
        assert bool((delta_of(layer).v == 1).all())
        assert not change_of(layer).any()
    A = pairs_of(model).A["8x8"].detach()
    assert 0 < float(A.abs().max()) <= 8**-0.5


def test_an_embedding_swaps_the_roles_as_in_lora():
    model = nn.Sequential(nn.Embedding(20, 8)).double()
    vl.inject(model, "tied-lora", targets="0", rank=2)
    assert not pairs_of(model).A["8x20"].any()
    assert bool(pairs_of(model).B["8x20"].any())


def test_the_numbers_of_a_pair_do_not_depend_on_the_other_shapes():
    one = pairs_of(adapted_chain("tied-lora", (6, 10), rank=3))
    other = pairs_of(adapted_chain("tied-lora", *SHAPES, rank=3))
    assert torch.equal(one.A["10x6"], other.A["10x6"])


def test_counts_and_single_storage():
    model = adapted_chain("tied-lora", *SHAPES, rank=3)
    sites = [layer.state.sites["default"]["weight"] for layer in model[:5]]
    tied = 3 * (16 + 16 + 12)
    assert TiedPairs.parameter_count(TiedLoRAConfig(rank=3), sites) == tied
    count = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert count == tied + sum(out + 3 for _, out in SHAPES)
    keys = [key for key in vl.adapter_state_dict(model) if key.startswith("shared.")]
    assert sorted(keys) == sorted(f"shared.{n}.{s}" for n in "AB" for s in ("10x6", "6x10", "6x6"))


def test_vit_counts():
    """q and v of 12 blocks: one pair for all 24 sites."""
    config = TiedLoRAConfig(rank=8)
    delta = vl.get_method("tied-lora").delta
    assert 24 * delta.parameter_count(config, 768, 768) == 24 * 776


def test_an_impossible_rank_is_refused():
    with pytest.raises(ConfigError, match="rank 7"):
        adapted_chain("tied-lora", (6, 10), rank=7)
