"""ReLoRA: a restart changes no output, adds rank, and survives checkpoints."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.ranks.planted import Problem
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.lora_plus import LoRAPlusConfig
from visionlora.dynamics.relora import ReLoRAConfig, prune_state, restart
from visionlora.errors import ConfigError
from visionlora.ranks.optimizer import group_of, set_rates
from visionlora.ranks.structure import places_of, structure_of
from visionlora.training import RunDirectory, TrainSettings, fit

METHODS = ["lora", "dora", "block-lora", "slora"]
DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model_of(method="lora", moved=True, head=False, **options):
    """Return a small network whose pairs have been somewhere."""
    torch.default_generator.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    model = vl.inject(net, method, ["0"], **{"rank": 2, "dropout": 0.0, **options})
    model[2].requires_grad_(head)
    if moved:
        generator = torch.Generator().manual_seed(2)
        for parameter in delta_of(model).parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise)
    return model


def place_of(model):
    return places_of(model)[0]


def delta_of(model):
    return place_of(model).delta


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model):
    return lambda x: (model(x) - 1.0).square().mean()


def stepper_of(model, every, kind=torch.optim.AdamW, lr=1e-2, **options):
    optimizer = kind(trained(model), lr=lr)
    dynamics = ReLoRAConfig(every=every, **options).build(model, optimizer, 100)
    return Stepper(model, optimizer, dynamics=[dynamics])


@pytest.mark.parametrize("method", METHODS)
def test_restart_changes_no_output_and_leaves_the_weight_alone(method):
    model = model_of(method)
    before, weight = model(DATA), place_of(model).host.view("weight").clone()
    for count in (1, 2):
        restart(place_of(model), count)
        assert_close(model(DATA), before)
        assert not delta_of(model).B.any()
        assert delta_of(model).A.any()
    assert torch.equal(place_of(model).host.view("weight"), weight)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_stay_the_same_objects_with_new_values(method):
    model = model_of(method)
    before = {name: (p, p.detach().clone()) for name, p in delta_of(model).named_parameters()}
    restart(place_of(model), 1)
    after = dict(delta_of(model).named_parameters())
    assert list(after) == list(before)
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value) == (name == "magnitude")


def test_every_restart_draws_another_pair_from_the_seed():
    drawn = []
    for _ in range(2):
        model = model_of()
        for count in (1, 2):
            restart(place_of(model), count)
            drawn.append(delta_of(model).A.detach().clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])


def test_rank_adds_up_to_that_of_the_weight():
    model = model_of()
    ranks, offsets = [], []
    for count in range(1, 6):
        change = delta_of(model).delta(place_of(model).host.view("weight"))
        ranks.append(int(torch.linalg.matrix_rank(change)))
        restart(place_of(model), count)
        offsets.append(delta_of(model).config.offset)
        delta_of(model).B.data.normal_(generator=torch.Generator().manual_seed(count))
    assert ranks == [2, 4, 6, 6, 6]
    assert offsets == [2, 4, 6, 6, 6]


def test_what_is_taken_off_from_the_start_stays_off():
    """A pair that began at a part of the weight is put aside without that part."""
    model = model_of(moved=False, init="pissa")
    before = model(DATA)
    restart(place_of(model), 1)
    assert_close(model(DATA), before)
    delta_of(model).A.data.add_(0.1)
    restart(place_of(model), 2)
    assert_close(model(DATA), before)


def test_restarts_come_every_so_many_steps_and_keep_the_function():
    model = model_of(moved=False)
    stepper = stepper_of(model, every=3)
    offsets = []
    for _ in range(8):
        stepper.step([DATA], loss_of(model))
        offsets.append(delta_of(model).config.offset)
    assert offsets == [0, 0, 0, 2, 2, 2, 4, 4]


def test_losses_before_the_first_restart_are_those_of_plain_training():
    one, other = model_of(), model_of()
    stepper = stepper_of(one, every=3)
    plain = Stepper(other, torch.optim.AdamW(trained(other), lr=1e-2))
    losses = [
        [trainer.step([DATA], loss_of(model)).loss for _ in range(4)]
        for trainer, model in ((stepper, one), (plain, other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)  # the fourth is taken after the restart


def test_rate_of_the_pair_rises_again_and_that_of_the_head_stays():
    model = model_of(head=True)
    stepper = stepper_of(model, every=4, warmup=2)
    rates = []
    for step in range(8):
        set_rates(stepper.optimizer, step, 1.0)
        rates.append(
            [group_of(stepper.optimizer, p)["lr"] for p in (delta_of(model).A, model[2].weight)]
        )
        stepper.step([DATA], loss_of(model))
    expected = [1e-2 * factor for factor in (1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1)]
    assert [pair for pair, _ in rates] == pytest.approx(expected)
    assert [head for _, head in rates] == [1e-2] * 8


def test_largest_moments_are_kept_with_one_mask():
    parameter = nn.Parameter(torch.zeros(4, 5))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.arange(20.0).reshape(4, 5) - 9.3
    optimizer.step()
    before = copy.deepcopy(optimizer.state[parameter])
    prune_state(optimizer, parameter, 0.8)
    state = optimizer.state[parameter]
    largest = parameter.grad.abs() >= parameter.grad.abs().flatten().sort().values[-4]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], before[name] * largest)
    assert state["step"] == before["step"]
    prune_state(optimizer, parameter, 1.0)
    assert parameter not in optimizer.state
    prune_state(optimizer, parameter, 0.5)  # nothing there, nothing to do


def test_moments_of_the_head_are_kept():
    model = model_of(head=True)
    stepper = stepper_of(model, every=2, prune=1.0)
    for _ in range(3):
        stepper.step([DATA], loss_of(model))
    counts = [stepper.optimizer.state[p]["step"] for p in (delta_of(model).A, model[2].weight)]
    assert counts == [1, 3]


@pytest.mark.parametrize("first", ["relora", "lora+"])
def test_with_lora_plus_both_rates_rise_again(first):
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    configs = [ReLoRAConfig(every=2, warmup=1), LoRAPlusConfig(ratio=4.0)]
    configs = configs if first == "relora" else configs[::-1]
    stepper = Stepper(model, optimizer, dynamics=[c.build(model, optimizer, 4) for c in configs])
    for step in range(3):
        set_rates(optimizer, step, 1.0)
        stepper.step([DATA], loss_of(model))
    rates = [group_of(optimizer, p)["lr"] for p in (delta_of(model).A, delta_of(model).B)]
    assert rates == pytest.approx([5e-3, 2e-2])


def test_a_step_that_failed_restarts_once():
    model = model_of()
    stepper = stepper_of(model, every=1)
    stepper.step([DATA], loss_of(model))

    def fails(x):
        raise OSError("power cut")

    for _ in range(2):
        with pytest.raises(OSError, match="power cut"):
            stepper.step([DATA], fails)
    stepper.step([DATA], loss_of(model))
    assert delta_of(model).config.offset == 2


def run(folder, method, resume=False, dies_at=None):
    problem = Problem(noise=0.2, examples=24)
    model = problem.model(method, rank=2, dropout=0.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    dynamics = ReLoRAConfig(every=3, warmup=1).build(model, optimizer, 8)

    def batches(step):
        if step == dies_at:
            raise OSError("power cut")
        return problem.batches(step)

    settings = TrainSettings(steps=8, device="cpu", checkpoint_every=1, log_every=8)
    where = RunDirectory(folder, resume=resume)
    result = fit(model, optimizer, problem.loss, batches, settings, where, dynamics=[dynamics])
    return model, result


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dies_at", [3, 4, 7])
def test_a_run_that_died_resumes_bit_for_bit(method, dies_at, tmp_path):
    whole, result = run(tmp_path / "whole", method)
    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "part", method, dies_at=dies_at)
    again, resumed = run(tmp_path / "part", method, resume=True)
    assert resumed.resumed_from == dies_at
    assert resumed.loss == result.loss
    assert structure_of(again) == structure_of(whole)
    inputs = Problem().inputs
    assert torch.equal(again(inputs), whole(inputs))


def test_a_restarted_adapter_is_saved_and_loaded(tmp_path):
    model, _ = run(tmp_path / "run", "lora")
    vl.save(model, tmp_path / "adapter.safetensors")
    fresh = copy.deepcopy(Problem().base)
    vl.load(fresh, tmp_path / "adapter.safetensors")
    inputs = Problem().inputs
    assert_close(fresh(inputs), model(inputs))


def test_defaults_follow_the_length_of_the_run():
    model = model_of()
    dynamics = ReLoRAConfig().build(model, torch.optim.AdamW(trained(model)), 400)
    assert (dynamics.every, dynamics.warmup) == (100, 10)


@pytest.mark.parametrize("method", ["lora-fa", "lora-xs", "full"])
def test_methods_without_a_trained_pair_are_refused(method):
    options = {} if method == "full" else {"rank": 2}
    torch.default_generator.manual_seed(0)
    model = vl.inject(nn.Sequential(nn.Linear(6, 7)).double(), method, ["0"], **options)
    with pytest.raises(ConfigError, match="could be put aside"):
        stepper_of(model, every=1)


def test_dropout_and_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="dropout=0"):
        stepper_of(model_of(dropout=0.1), every=1)
    for options in ({"every": 0}, {"warmup": -1}, {"prune": 1.5}):
        with pytest.raises(ConfigError, match=f"relora: {next(iter(options))}"):
            ReLoRAConfig(**options)
