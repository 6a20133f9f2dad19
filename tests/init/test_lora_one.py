"""LoRA-One: a truncated gradient step of a set length, in balanced factors."""

import pytest
import torch

from tests.init.given import best, given, matrix, product
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.lora_one import LoRAOne

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
S = 1.5


@SHAPES
@pytest.mark.parametrize("arms", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_change_is_a_truncated_gradient_step(shape, arms, rank):
    g = matrix(*shape)
    site = given(shape, rank, "blocks", gradient=g, scale=S, arms=arms)
    largest = torch.linalg.svdvals(g)[0]
    change = S * product(LoRAOne().start(site))
    assert_close(change, -S / (128 * largest) * best(g, rank))
    assert float((change * g).sum()) < 0


@SHAPES
def test_the_factors_are_balanced(shape):
    start = LoRAOne().start(given(shape, gradient=matrix(*shape)))
    assert_close(start.up.t() @ start.up, start.down @ start.down.t())
    assert not start.taken_off


def test_several_arms_are_balanced_as_training_sees_them():
    """B, the sum of n arms, and A move as a pair `(B / sqrt n, A)` would under sqrt(n) s."""
    start = LoRAOne().start(given(gradient=matrix(12, 10), form="blocks", arms=4))
    B = start.up / 4**0.5
    assert_close(B.t() @ B, start.down @ start.down.t())


@pytest.mark.parametrize("factor", [1000.0, 1e-30])
def test_the_size_of_the_gradient_does_not_matter(factor):
    g = matrix(12, 10)
    one, other = (product(LoRAOne().start(given(gradient=k * g))) for k in (1.0, factor))
    assert_close(one, other)


def test_the_loss_goes_down_for_a_short_step():
    x, W, goal = matrix(10, 40, seed=4), matrix(12, 10, seed=1), matrix(12, 40, seed=5)

    def loss(weight):
        return float((weight @ x - goal).square().mean())

    g = 2 * (W @ x - goal) @ x.t() / goal.numel()
    site = given(weight=W, gradient=g, scale=S)
    losses = [loss(W + S * product(LoRAOne(gamma=gamma).start(site))) for gamma in (128.0, 1e4)]
    assert losses[0] < losses[1] < loss(W)


def test_impossible_options_and_gradients_are_refused():
    with pytest.raises(ConfigError, match="gamma"):
        LoRAOne(gamma=0.0)
    with pytest.raises(ConfigError, match=r"lora-one: the gradient at layer\.weight is zero"):
        LoRAOne().start(given(gradient=torch.zeros(12, 10)))
