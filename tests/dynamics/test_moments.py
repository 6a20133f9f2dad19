"""Moments: the directions are those of AdamW on the whole gradient."""

import pytest
import torch

from tests.tolerances import assert_close
from visionlora.dynamics.moments import Moments


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def directions(gradients):
    """Return the steps of AdamW with rate 1, turned round."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        yield before - weight.detach()


@pytest.mark.parametrize("block", [1, 10, 1 << 18])
def test_a_gradient_of_low_rank_has_the_direction_of_the_whole(block, monkeypatch):
    monkeypatch.setattr("visionlora.dynamics.moments._BLOCK", block)
    lefts, rights = ([normal(*s, seed=i) for i in range(4)] for s in ((7, 2), (2, 5)))
    up, down = normal(7, 3, seed=8), normal(3, 5, seed=9)
    moments = Moments(0.8, 0.95, 1e-6)
    whole = directions([a @ b for a, b in zip(lefts, rights, strict=True)])
    for left, right, u in zip(lefts, rights, whole, strict=True):
        into_up, into_down = moments.through_pair("w", left, right, up, down)
        assert_close(into_up, u @ down.T)
        assert_close(into_down, up.T @ u)


def test_every_name_has_steps_of_its_own():
    gradients = [normal(3, 4, seed=i) for i in range(3)]
    moments = Moments(0.8, 0.95, 1e-6)
    moments.of("other", normal(2, 2, seed=5))
    for gradient, u in zip(gradients, directions(gradients), strict=True):
        assert_close(moments.of("w", gradient), u)
    assert moments.steps == {"other": 1, "w": 3}


def test_state_round_trip_continues_bit_for_bit():
    gradients = [normal(3, 4, seed=i) for i in range(3)]
    one, other = (Moments(0.8, 0.95, 1e-6) for _ in range(2))
    one.of("w", gradients[0])
    other.load_state_dict(one.state_dict(), lambda name: torch.device("cpu"))
    for gradient in gradients[1:]:
        assert torch.equal(one.of("w", gradient), other.of("w", gradient))
