"""Learning-rate multipliers."""

import pytest
import torch

from visionlora.errors import ConfigError
from visionlora.training import constant, cosine


def test_cosine_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.01)
    ours = cosine(30, floor=0.05)
    for step in range(31):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * ours(step), rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup_rises_linearly_to_the_full_rate():
    for schedule in (cosine(100, warmup=4), constant(warmup=4)):
        assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays():
    assert {constant()(step) for step in (0, 1, 1000)} == {1.0}


def test_cosine_stays_at_the_floor_after_the_end():
    assert cosine(10, floor=0.1)(25) == pytest.approx(0.1)


def test_impossible_schedules_are_refused():
    with pytest.raises(ConfigError, match="no room after 5 warm-up steps"):
        cosine(5, warmup=5)
    with pytest.raises(ConfigError, match="floor"):
        cosine(5, floor=2.0)
    with pytest.raises(ConfigError, match="warmup"):
        constant(warmup=-1)
