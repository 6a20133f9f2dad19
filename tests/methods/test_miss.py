"""MiSS: shards with padding, its variants, and which shapes they need."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.methods.single_layer import adapt, change, delta_of, inputs, rank, view
from tests.tolerances import assert_close
from visionlora.errors import ConfigError


@pytest.mark.parametrize("width", [12, 10, 9, 4])
@pytest.mark.parametrize("options", [{}, {"variant": "mini", "mini_rank": 2}])
def test_the_input_is_folded_with_zeros_at_its_end(width, options):
    model, x = adapt(nn.Linear(width, 6), "miss", rank=4, **options), inputs(3, width)
    D = delta_of(model).D.detach()
    D = D.repeat(1, 6 // D.shape[1])
    expected = torch.stack([D[j % 4] for j in range(width)], 1)
    assert_close(change(model), expected)
    assert_close(model(x), nn.functional.linear(x, view(model) + expected, model[0].bias))


def test_the_rank_is_at_most_the_shard():
    assert rank(change(adapt(nn.Linear(16, 12), "miss", rank=4))) == 4
    mini = adapt(nn.Linear(16, 12), "miss", rank=4, variant="mini", mini_rank=2)
    assert rank(change(mini)) == 2


def test_mini_with_all_outputs_is_balance():
    one = adapt(nn.Linear(16, 12), "miss", rank=4)
    other = adapt(nn.Linear(16, 12), "miss", rank=4, variant="mini", mini_rank=12)
    assert_close(change(one), change(other))


def test_bat_changes_each_block_of_the_weight_by_its_row_of_blocks():
    model = adapt(nn.Linear(8, 6), "miss", rank=2, variant="bat")
    D, weight, expected = delta_of(model).D.detach(), view(model), torch.zeros(6, 8).double()
    for k in range(3):
        for j in range(4):
            block = slice(2 * k, 2 * k + 2), slice(2 * j, 2 * j + 2)
            expected[block] = weight[block] @ D[k] + D[k]
    assert_close(change(model), expected)
    assert_close(model(inputs(3, 8)), model[0].bias + inputs(3, 8) @ (weight + expected).t())


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_convolutions_and_tokens_fold_the_columns_of_the_view(variant):
    conv = adapt(nn.Conv2d(3, 4, 3), "miss", rank=4, variant=variant)
    tokens = adapt(nn.Embedding(10, 4), "miss", rank=4, variant=variant)
    for model in (conv, tokens):
        D = delta_of(model).up().t()
        assert_close(change(model), D[torch.arange(view(model).shape[1]) % 4].t())
    index = torch.arange(10)
    assert_close(tokens(index), tokens[0].weight + change(tokens).t())


def test_dropout_acts_on_the_input():
    model = adapt(nn.Linear(12, 6), "miss", rank=4, dropout=0.5)
    x = inputs(3, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, "at most 16"),
        ({"rank": 5, "variant": "bat"}, "divide both"),
        ({"rank": 8, "variant": "bat"}, "divide both"),
        ({"rank": 4, "variant": "mini", "mini_rank": 5}, "divide the output"),
        ({"rank": 4, "variant": "bat", "dropout": 0.1}, "no dropout"),
        ({"rank": 0}, "at least 1"),
        ({"mini_rank": 0}, "at least 1"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_impossible_shards_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(nn.Linear(16, 12), "miss", **options)


def test_counts():
    delta = vl.get_method("miss").delta
    for options, count in (({}, 64 * 768), ({"variant": "bat"}, 64 * 768)):
        assert delta.parameter_count(vl.build_config("miss", options), 768, 768) == count
    mini = vl.build_config("miss", {"variant": "mini", "mini_rank": 8})
    assert delta.parameter_count(mini, 768, 768) == 64 * 8
