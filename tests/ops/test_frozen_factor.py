"""Half of a branch through the changed weight, where one factor is frozen: the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from visionlora.ops import Branch, lora, lora_linear, multiply_adds

TOKENS, OUT, IN, RANK = 40, 8, 6, 4
# Both ways of every choice: few and many tokens, thin and full factors.
SIZES = [(40, 8, 6, 4), (40, 8, 6, 6), (7, 16, 12, 5), (7, 9, 12, 9)]


def call(frozen, x, weight, bias, up, down, rows):
    return lora_linear(x, weight, bias, [Branch(up, down, 0.7, rows, frozen)])


def case(frozen, rows, size=SIZES[0]):
    tokens, out, width, rank = size
    shapes = ((tokens, width), (out, width), (out,), (3 if rows else out, rank), (rank, width))
    x, weight, bias, up, down = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    trained = down if frozen == "up" else up
    return x.requires_grad_(), weight, bias, up, down, trained.requires_grad_()


@pytest.fixture(autouse=True)
def _any_rank_is_large(monkeypatch):
    monkeypatch.setattr(lora, "_LARGE_RANK", 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [None, (2, 5)])
@pytest.mark.parametrize("frozen", ["up", "down"])
def test_output_and_gradients_equal_the_definition(frozen, rows, size):
    x, weight, bias, up, down, trained = case(frozen, rows, size)
    weight.requires_grad_(size is SIZES[1])
    change = 0.7 * up @ down
    if rows:
        change = F.pad(change, (0, 0, rows[0], len(weight) - rows[1]))
    expected = F.linear(x, weight + change, bias)
    actual = call(frozen, x, weight, bias, up, down, rows)
    assert_close(actual, expected)
    g = torch.randn_like(actual)
    sources = [x, trained, *([weight] if weight.requires_grad else [])]
    for one, other in zip(
        torch.autograd.grad(actual, sources, g),
        torch.autograd.grad(expected, sources, g),
        strict=True,
    ):
        assert_close(one, other)


@pytest.mark.parametrize("size", [(15, 8, 6, 4), (5, 9, 4, 3)], ids=str)
@pytest.mark.parametrize("frozen", ["up", "down"])
def test_second_derivatives_are_right(frozen, size):
    x, weight, bias, up, down, trained = case(frozen, None, size)

    def function(x, trained):
        pair = (up, trained) if frozen == "up" else (trained, down)
        return call(frozen, x, weight, bias, *pair, None)

    assert torch.autograd.gradgradcheck(function, (x, trained))


def test_it_is_counted_as_cheaper_only_where_it_is():
    both = multiply_adds(1000, 100, 300, 200, "")
    assert multiply_adds(1000, 100, 300, 200, "up") < both
    assert multiply_adds(1000, 100, 300, 200, "down") < both
    few = multiply_adds(10, 100, 300, 200, "up")  # too few tokens for a changed weight
    assert few == multiply_adds(10, 100, 300, 200, "")
