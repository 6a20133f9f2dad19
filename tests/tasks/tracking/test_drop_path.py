"""Stochastic depth: right on average, per sample, and on a part of the batch above 0.1."""

import pytest
import torch

from tasks.tracking.model import LoRAT
from tasks.tracking.model.drop_path import residual
from tests.tasks.tracking.lorats import SHAPE, batch, vit
from tests.tolerances import assert_close


def ones(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_expectation_is_the_plain_residual(rate: float) -> None:
    x = torch.zeros(10, 3, 2)
    mean = torch.stack([residual(x, ones, rate) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, torch.ones_like(x), atol=0.1, rtol=0)


def test_low_rates_drop_samples_one_by_one() -> None:
    kept = residual(torch.zeros(4000, 1, 1), ones, 0.1).flatten()
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert float((kept > 0).float().mean()) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("size", "kept"), [(16, 9), (3, 1), (1, 1)])
def test_high_rates_run_the_branch_on_fewer_samples(size: int, kept: int) -> None:
    seen: list[int] = []

    def branch(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return ones(x)

    found = residual(torch.zeros(size, 2, 2), branch, 0.4)[:, 0, 0]
    assert seen == [kept]
    assert int((found > 0).sum()) == kept
    assert_close(found.max(), torch.tensor(size / kept))


def test_subset_branch_sees_its_own_samples() -> None:
    x = torch.arange(8.0).view(8, 1, 1)
    found = (residual(x, lambda t: t, 0.4) / x.clamp(min=1)).flatten()[1:]
    assert all(value in (1.0, pytest.approx(1 + 8 / 4)) for value in found.tolist())


def test_no_drop_in_evaluation() -> None:
    model = LoRAT(vit(), SHAPE, drop_path=0.4)
    inputs = batch(4)
    model.train()
    assert not torch.equal(model(*inputs).score, model(*inputs).score)
    model.eval()
    assert torch.equal(model(*inputs).score, model(*inputs).score)
    plain = LoRAT(vit(), SHAPE).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs).score, plain(*inputs).score)


def test_every_block_has_the_same_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.tracking.model import lorat

    rates: list[float] = []

    def spy(x: torch.Tensor, branch: object, rate: float = 0.0) -> torch.Tensor:
        rates.append(rate)
        return residual(x, branch, rate)  # type: ignore[arg-type]

    monkeypatch.setattr(lorat, "residual", spy)
    LoRAT(vit(depth=3), SHAPE, drop_path=0.1).train()(*batch())
    assert rates == [0.1] * 6
