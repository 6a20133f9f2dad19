"""Ranks that follow contributions: under the budget, near it, and exact as adapters."""

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.ranks.assigned import inject_ranks
from visionlora.ranks.contribution import (
    LayerSize,
    allocate,
    layer_scores,
    layer_sizes,
    uniform,
)

LAYERS = [
    LayerSize("a", 32, 27),
    LayerSize("b", 64, 64),
    LayerSize("c", 64, 9),
    LayerSize("d", 128, 64),
]
SCORES = {"a": 8e-4, "b": 2e-5, "c": 3e-4, "d": 1e-6}
TOTAL = sum(layer.weights for layer in LAYERS)


def cost(allocation):
    return sum(
        layer.cost(allocation.ranks[layer.name]) for layer in LAYERS if allocation.ranks[layer.name]
    )


@pytest.mark.parametrize("share", [0.06, 0.1, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_what_is_trained_is_counted_and_within_the_budget(share, gamma):
    budget = int(share * TOTAL)
    found = allocate(LAYERS, SCORES, budget, gamma=gamma)
    assert found.trained == cost(found) <= budget
    assert found.trained > 0.6 * budget


def test_more_budget_trains_more():
    trained = [
        allocate(LAYERS, SCORES, int(share * TOTAL / 100)).trained for share in range(6, 101)
    ]
    assert trained == sorted(trained)
    whole = allocate(LAYERS, SCORES, TOTAL)
    assert whole.dense == {layer.name for layer in LAYERS}
    assert whole.trained == TOTAL


def test_layers_that_contribute_more_are_freer():
    found = allocate(LAYERS, SCORES, int(0.25 * TOTAL))
    freedom = {layer.name: layer.cost(found.ranks[layer.name]) / layer.weights for layer in LAYERS}
    assert freedom["a"] > freedom["b"] > freedom["d"]
    steeper = allocate(LAYERS, SCORES, int(0.25 * TOTAL), gamma=1.0)
    assert steeper.ranks["d"] < found.ranks["d"]


def test_only_relations_of_scores_count():
    tenfold = {name: 10 * score for name, score in SCORES.items()}
    assert allocate(LAYERS, tenfold, 2000).ranks == allocate(LAYERS, SCORES, 2000).ranks


def test_layers_are_left_frozen_where_the_budget_is_too_small_for_all():
    found = allocate(LAYERS, SCORES, 250, beta=0.0)
    assert found.ranks["d"] == 0
    assert 0 < found.trained <= 250


def test_uniform_ranks_are_the_largest_that_fit():
    found = uniform(LAYERS, 2000)
    assert found.trained == cost(found) <= 2000
    rank = found.ranks["d"]
    assert set(found.ranks.values()) == {rank}
    more = {layer.name: min(rank + 1, layer.largest) for layer in LAYERS}
    assert sum(layer.cost(more[layer.name]) for layer in LAYERS) > 2000
    assert uniform(LAYERS, TOTAL).trained == TOTAL


def test_budgets_and_scores_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="at least 59 are needed"):
        allocate(LAYERS, SCORES, 3)
    rank_1 = sum(layer.out + layer.into for layer in LAYERS)
    with pytest.raises(ConfigError, match=f"rank 1 needs {rank_1}"):
        uniform(LAYERS, 3)
    with pytest.raises(ConfigError, match="no score for b and 2 more layers"):
        allocate(LAYERS, {"a": 1.0}, 2000)
    with pytest.raises(ConfigError, match="all scores are zero"):
        allocate(LAYERS, dict.fromkeys("abcd", 0.0), 2000)
    with pytest.raises(ConfigError, match="the score of c is nan"):
        allocate(LAYERS, {**SCORES, "c": float("nan")}, 2000)


def convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 2, 2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2, padding_mode="reflect", groups=2),
        nn.Conv2d(32, 3, 1),
    )


def test_sizes_are_those_of_the_weights_as_matrices():
    sizes = [(layer.out, layer.into) for layer in layer_sizes(convs(), "type:Conv2d")]
    assert sizes == [(16, 27), (16, 9), (32, 64), (32, 144), (3, 32)]


def test_scores_are_means_of_the_weights():
    layers = layer_sizes(convs(), "type:Conv2d")
    values = {f"{layer.name}.weight": torch.full((2, 3), i + 1.0) for i, layer in enumerate(layers)}
    assert layer_scores(values, layers) == {"0": 1, "1": 2, "2": 3, "3": 4, "4": 5}
    del values["3.weight"]
    with pytest.raises(ConfigError, match=r"no attribution of 3\.weight"):
        layer_scores(values, layers)


def test_layers_get_their_ranks_and_whole_matrices(tmp_path):
    model, picture = convs(), torch.rand(2, 3, 12, 12)
    plain = model(picture)
    inject_ranks(model, {"0": 16, "1": 2, "2": 3, "3": 0, "4": 1})
    assert torch.equal(model(picture), plain)
    sizes = {name: tuple(p.shape) for name, p in vl.trainable_parameters(model)}
    assert sizes["0.adapters.default.weight.D"] == (16, 27)
    assert sizes["1.adapters.default.weight.A"] == (2, 9)
    assert sizes["2.adapters.default.weight.B"] == (32, 3)
    assert not any(name.startswith("3") for name in sizes)
    with torch.no_grad():
        for _, parameter in vl.trainable_parameters(model):
            parameter.normal_(0, 0.1)
    changed = model(picture)
    assert not torch.allclose(changed, plain, atol=1e-2)
    vl.save(model, tmp_path / "a.safetensors")
    again = vl.load(convs(), tmp_path / "a.safetensors")
    assert torch.equal(again(picture), changed)
    with vl.merged(model):
        torch.testing.assert_close(model(picture), changed, atol=1e-5, rtol=1e-5)
    vl.eject(model)
    assert torch.equal(model(picture), plain)


def test_wrong_ranks_are_named():
    for ranks, message in (
        ({"5": 1}, "there is no layer '5'"),
        ({"0": -1}, "whole number from 0 on, got -1"),
        ({"0": 17}, "at most 16"),
        ({"0": 0}, "nothing would be trained"),
    ):
        with pytest.raises(ConfigError, match=message):
            inject_ranks(convs(), ranks)
