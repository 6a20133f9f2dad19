"""Loss scaling, with torch's scaler for the CPU in place of the one for a GPU."""

import pytest
import torch
from torch import nn

from visionlora.dynamics import Dynamics, PlainBackend, Stepper
from visionlora.training import RunDirectory, TrainSettings
from visionlora.training.accelerator import AcceleratorBackend


class Again(Dynamics):
    """Uses the gradient at a fixed shift of the parameters."""

    name = "again"
    wants_second_pass = True

    def second_pass(self, context):
        kept = [p.detach().clone() for p in context.parameters]
        with torch.no_grad():
            for parameter in context.parameters:
                parameter.add_(0.125)
        context.backward_again()
        with torch.no_grad():
            for parameter, value in zip(context.parameters, kept, strict=True):
                parameter.copy_(value)


@pytest.fixture
def scaled(tmp_path):
    settings = TrainSettings(steps=1, device="cpu")
    with AcceleratorBackend(settings, RunDirectory(tmp_path)) as backend:
        backend.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        yield backend


def train(backend, dynamics=(), steps=20, factor=1.0):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    inputs = torch.randn(2, 8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stepper = Stepper(
        model, optimizer, backend=backend, dynamics=dynamics, clip_norm=0.1, max_skipped=20
    )

    def loss_fn(batch):
        return factor * model(batch).square().mean()

    reports = [stepper.step(list(inputs), loss_fn) for _ in range(steps)]
    return model.weight.detach(), reports


@pytest.mark.parametrize("dynamics", [[], [Again()]], ids=["one pass", "two passes"])
def test_loss_scale_changes_no_number(scaled, dynamics):
    weight, reports = train(scaled, dynamics)
    expected, expected_reports = train(PlainBackend(), dynamics)
    assert torch.equal(weight, expected)  # a power of two costs no bits
    assert reports == expected_reports


def test_overflow_lowers_the_scale_until_steps_apply(scaled):
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weight, reports = train(scaled, factor=2.0**10)
    skipped = [report.skipped for report in reports]
    count = sum(skipped)
    assert 0 < count < len(reports)
    assert skipped == sorted(skipped, reverse=True)
    assert scaled.state_dict()["scale"] == 2.0 ** (127 - count)
    applied = len(reports) - count
    assert torch.equal(weight, train(PlainBackend(), factor=2.0**10, steps=applied)[0])


def test_loss_scale_is_part_of_the_state(scaled):
    train(scaled)
    scaled.skip()
    state = scaled.state_dict()
    assert state["scale"] == 512.0
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled.accelerator.scaler.scale(torch.ones(1))
    scaled.load_state_dict(state)
    assert scaled.state_dict() == state
