"""Ranks halved while training: when, with what error, what the optimiser knows, and resuming."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError
from visionlora.ranks.controller import controllers_of
from visionlora.ranks.in_squeeze import InSqueeze, halvings
from visionlora.ranks.optimizer import set_rates
from visionlora.training import RunDirectory, TrainSettings, fit

STEPS = 20


# -- the schedule


@pytest.mark.parametrize("target", [1, 2, 3, 8])
@pytest.mark.parametrize("ratio", [2, 4, 8, 16])
@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_the_halvings_lie_between_015_and_07_of_the_run(target, ratio, steps):
    found = halvings(ratio * target, target, steps)
    count = ratio.bit_length() - 1
    assert [rank for _, rank in found] == [ratio * target >> i + 1 for i in range(count)]
    expected = [int(steps * (0.15 + 0.55 * i / count)) for i in range(count)]
    assert [step for step, _ in found] == expected
    assert all(0.15 * steps - 1 < step < 0.7 * steps for step, _ in found)


def test_ranks_that_are_no_power_apart_end_at_the_target():
    assert [rank for _, rank in halvings(11, 2, 100)] == [6, 3, 2]
    assert halvings(4, 4, 100) == []


# -- a run


def batches(index):
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(16, 10, generator=generator, dtype=torch.float64)


def goal():
    torch.manual_seed(3)
    return (torch.randn(12, 2) @ torch.randn(2, 10)).double()


def loss_fn(model, x):
    first, second = (layer.weight.detach() for layer in model)
    return (model(x) - x @ (first + goal()).t() @ second.t()).square().mean()


def build(method="squeeze-lora", dropout=0.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 3, bias=False)).double()
    vl.inject(model, method, targets="type:Linear", rank=2, dropout=dropout, **options)
    return model


def run(model, folder, *, steps=STEPS, resume=False, source=batches, dynamics=()):
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, 2e-2, 0.01))
    settings = TrainSettings(steps=steps, device="cpu", checkpoint_every=3, log_every=5)
    run = RunDirectory(folder, resume=resume)
    result = fit(model, optimizer, loss_fn, source, settings, run, dynamics=dynamics)
    return result, optimizer


def ranks(model):
    return [layer.adapters["default"]["weight"].A.shape[0] for layer in model]


def stepped(model):
    """Return a stepper with the controller, and the optimiser."""
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, 2e-2, 0.0))
    stepper = Stepper(model, optimizer, dynamics=controllers_of(model, optimizer, STEPS))
    return stepper, optimizer


def test_ranks_fall_to_the_target_and_the_sites_become_plain_lora(tmp_path):
    model = build(start_rank=8)
    assert ranks(model) == [8, 3]  # the second layer has no room for 8
    result, _ = run(model, tmp_path / "run")
    assert ranks(model) == [2, 2]
    configs = [layer.adapters["default"]["weight"].config for layer in model]
    assert [(c.method, c.rank, c.scale) for c in configs] == [("lora", 2, 1.0)] * 2
    path = vl.save(model, tmp_path / "a.safetensors")
    fresh = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 3, bias=False)).double()
    fresh.load_state_dict(vl.eject(build()).state_dict())
    x = batches(999)
    assert torch.equal(vl.load(fresh, path)(x), model(x))
    assert result.loss < loss_fn(vl.eject(build()), x).item()


def test_every_halving_is_the_best_approximation_with_fresh_moments_and_a_warm_up():
    model = build(start_rank=8, alpha=3.0)
    stepper, optimizer = stepped(model)
    plan = dict(halvings(8, 2, STEPS))
    seen = []
    for step in range(STEPS):
        set_rates(optimizer, step, 1.0)
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(1e-2 if step in plan else 2e-2)
        delta = model[0].adapters["default"]["weight"]
        before = {}
        original = optimizer.step

        def spy(*args, original=original, delta=delta, before=before):
            original(*args)
            before["change"] = delta.delta(model[0].weight).detach().clone()

        optimizer.step = spy
        report = stepper.step([batches(step)], lambda x: loss_fn(model, x))
        optimizer.step = original
        now = model[0].adapters["default"]["weight"]
        assert report.changed == (step + 1 in plan)
        assert now.scale == 1.5
        if step + 1 in plan:
            rank = plan[step + 1]
            seen.append(rank)
            u, values, v = torch.linalg.svd(before["change"], full_matrices=False)
            assert_close(now.delta(model[0].weight), (u[:, :rank] * values[:rank]) @ v[:rank])
            assert now.config.start_rank == rank
            assert not optimizer.state.get(now.A)
        else:
            assert_close(now.delta(model[0].weight), before["change"])
            assert optimizer.state[now.A]["exp_avg"].shape == now.A.shape
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for _, p in vl.trainable_parameters(model))
        assert {id(p) for p in optimizer.state} <= set(held)
    assert seen == [4, 2]


def test_the_new_tensors_go_on_training():
    model = build(start_rank=4)
    stepper, _ = stepped(model)
    (last, _), *_ = halvings(4, 2, STEPS)
    for step in range(last):
        stepper.step([batches(step)], lambda x: loss_fn(model, x))
    before = {name: p.detach().clone() for name, p in vl.trainable_parameters(model)}
    stepper.step([batches(last)], lambda x: loss_fn(model, x))
    for name, parameter in vl.trainable_parameters(model):
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("after", [2, 4, 9, 13])
def test_a_run_killed_around_a_halving_resumes_exactly(tmp_path, after):
    # halvings of 8 to 2 in 20 steps come at 3 and 8; checkpoints at 3, 6, 9, ...
    whole = build(start_rank=8, dropout=0.2)
    expected, _ = run(whole, tmp_path / "whole")

    def failing(index):
        if index == after:
            raise OSError("power cut")
        return batches(index)

    with pytest.raises(OSError, match="power cut"):
        run(build(start_rank=8, dropout=0.2), tmp_path / "killed", source=failing)
    resumed = build(start_rank=8, dropout=0.2)
    result, _ = run(resumed, tmp_path / "killed", resume=True)
    assert result.resumed_from == (after // 3 * 3 or None)
    assert result.loss == expected.loss
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unfinished_adapter_can_be_saved_and_loaded(tmp_path):
    model = build(start_rank=8)
    stepper, _ = stepped(model)
    for step in range(5):
        stepper.step([batches(step)], lambda x: loss_fn(model, x))
    assert ranks(model) == [4, 3]
    path = vl.save(model, tmp_path / "a.safetensors")
    fresh = vl.load(vl.eject(build()), path)
    assert torch.equal(fresh(batches(0)), model(batches(0)))
    assert {layer.adapters["default"]["weight"].config.start_rank for layer in fresh} == {4}


def test_a_frozen_factor_stays_frozen_and_out_of_the_optimizer():
    model = build(start_rank=4)
    for layer in model:
        layer.adapters["default"]["weight"].A.requires_grad_(False)
    stepper, optimizer = stepped(model)
    for step in range(10):
        stepper.step([batches(step)], lambda x: loss_fn(model, x))
    assert ranks(model) == [2, 2]
    assert not any(layer.adapters["default"]["weight"].A.requires_grad for layer in model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_planted_change_of_the_target_rank_is_found(tmp_path):
    result, _ = run(build(start_rank=8), tmp_path / "in", steps=100)
    assert result.loss < 0.1 * loss_fn(vl.eject(build()), batches(0)).item()


def test_the_default_is_four_times_the_rank_and_less_than_the_rank_is_refused():
    assert ranks(build()) == [8, 3]
    with pytest.raises(ConfigError, match="start_rank"):
        build(start_rank=1)


def test_only_squeeze_lora_brings_the_controller():
    model = build()
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, 1e-2, 0.0))
    assert [type(item) for item in controllers_of(model, optimizer, 10)] == [InSqueeze]
    model = build("lora")
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, 1e-2, 0.0))
    assert controllers_of(model, optimizer, 10) == []
