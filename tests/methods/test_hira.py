"""HiRA: zeros stay, the rank is that of W, and the change always starts from the frozen W."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.methods.single_layer import adapt, change, delta_of, inputs, rank, view
from tests.tolerances import assert_close
from visionlora.errors import ConfigError


@pytest.mark.parametrize("layer", [nn.Linear(16, 12), nn.Conv2d(4, 6, 3), nn.Embedding(11, 8)])
def test_zero_entries_never_move(layer):
    model = adapt(layer, "hira", rank=2)
    with torch.no_grad():
        model[0].weight[::2] = 0
    zeros = view(model) == 0
    assert not change(model)[zeros].any()
    assert bool((change(model)[~zeros] != 0).all())
    vl.eject(model, merge=True)
    assert not model[0].weight[::2].any()


def test_the_rank_of_the_change_is_that_of_the_weight():
    assert rank(change(adapt(nn.Linear(16, 12), "hira", rank=1))) == 12
    assert rank(change(adapt(nn.Linear(16, 12), "hira", rank=2))) == 12


def test_the_form_by_rank_is_the_same_function():
    model, x = adapt(nn.Linear(16, 12), "hira", rank=3), inputs(5, 16)
    delta, layer = delta_of(model), model[0]
    y = nn.functional.linear(x, layer.weight, layer.bias)
    for k in range(3):
        y = y + delta.B[:, k] * nn.functional.linear(x * delta.A[k], layer.weight)
    assert_close(model(x), y)


def test_two_merged_adapters_both_multiply_the_frozen_weight():
    model = adapt(nn.Linear(16, 12), "hira", rank=2)
    vl.inject(model, "hira", targets="0", name="other", rank=3, seed=5)
    with torch.no_grad():
        model[0].adapters["other"]["weight"].B.normal_()
    weight = view(model).clone()
    pairs = [model[0].adapters[name]["weight"] for name in ("default", "other")]
    expected = weight + sum(weight * (pair.B @ pair.A) for pair in pairs)
    vl.eject(model, merge=True)
    assert_close(model[0].weight, expected)


def test_impossible_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"rank 13.*12 x 16.*at most 12"):
        adapt(nn.Linear(16, 12), "hira", rank=13)
    with pytest.raises(ConfigError, match="at least 1"):
        vl.build_config("hira", {"rank": 0})
