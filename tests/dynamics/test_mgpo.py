"""The laws of MGPO: what it remembers, how far it moves, and that it always comes back."""

import copy

import pytest
import torch

import visionlora as vl
from tests.dynamics.test_sam import (
    Tower,
    adapted,
    batch,
    loss_of,
    same,
    stepper,
    tower,
    trained,
    values,
)
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, Stepper
from visionlora.dynamics.mgpo import MGPOConfig
from visionlora.errors import ConfigError
from visionlora.ranks.structure import places_of


class Notes(Dynamics):
    """Notes parameters in the forward and gradients when they are complete, adapters only."""

    name = "notes"

    def __init__(self, model):
        self.model = model
        self.home, self.moved, self.gradients = [], [], []

    def penalty(self, context):
        self.moved.append(flat(adapted(self.model)))

    def on_grads_ready(self, context):
        self.home.append(flat(adapted(self.model)))
        self.gradients.append(flat([p.grad for p in adapted(self.model)]))


def flat(tensors):
    return torch.cat([item.detach().flatten() for item in tensors])


def watched(model, config, **options):
    notes = Notes(model)
    run = stepper(model, config, **options)
    run.dynamics = (*run.dynamics, notes)
    return run, notes


def train(run, model, steps, scale=1.0):
    for _ in range(steps):
        run.step([batch()], lambda x: scale * loss_of(model)(x))


def test_moves_follow_the_equation():
    model = tower()
    config = MGPOConfig(rho=0.2, mu=0.8, beta=0.7)
    run, notes = watched(model, config)
    for index in range(6):
        scale = 10.0 if index == 3 else 1.0  # one odd batch
        run.step([batch()], lambda x, scale=scale: scale * loss_of(model)(x))
    momentum, usual = torch.zeros_like(notes.gradients[0]), None
    factors = []
    for step in range(6):
        eps = notes.moved[step] - notes.home[step]
        if step == 0:
            assert torch.equal(notes.moved[0], notes.home[0])
        else:
            factor = max(0.5, min(2.0, float(norm / usual)))
            factors.append(factor)
            assert_close(eps, 0.2 * factor * momentum / momentum.norm())
        gradient = notes.gradients[step]
        norm = gradient.norm()
        momentum = 0.8 * momentum + 0.2 * gradient
        usual = norm if usual is None else 0.7 * usual + 0.3 * norm
    assert factors[0] == 1.0  # the first norm is its own average
    assert factors[3] == 2.0  # bounded after the odd batch


def test_the_first_step_is_a_plain_one():
    model, plain = tower(), tower()
    train(stepper(model, MGPOConfig()), model, 1)
    train(stepper(plain, None), plain, 1)
    assert same(values(model), values(plain))


def test_radius_zero_is_plain_training():
    model, plain = tower(drop=0.3), tower(drop=0.3)
    for made, config in ((model, MGPOConfig(rho=0.0)), (plain, None)):
        torch.default_generator.manual_seed(5)
        train(stepper(made, config, optimizer=torch.optim.AdamW), made, 5)
    assert same(values(model), values(plain))


def test_one_forward_per_step():
    model = tower()
    train(stepper(model, MGPOConfig()), model, 4)
    assert model.calls == 4


@pytest.mark.parametrize("method", ["lora", "dora", "slora", "lora-fa"])
def test_a_step_of_rate_zero_changes_no_bit(method):
    model = tower(method=method, dtype=torch.float32)
    before = values(model)
    run = stepper(model, MGPOConfig(rho=0.7), lr=0.0)
    for _ in range(4):
        run.step([batch(dtype=torch.float32)], loss_of(model))
    assert same(values(model), before)


def test_every_micro_batch_sees_the_moved_tensors_and_nothing_else_moves():
    model = tower()
    run = stepper(model, MGPOConfig(rho=0.3))
    train(run, model, 1)
    home, seen = values(model), []

    def loss(x):
        seen.append(values(model))
        return loss_of(model)(x)

    run.step(list(batch().split(4)), loss)
    assert all(same(seen[0], other) for other in seen[1:])
    moved = {key for key in home if not torch.equal(home[key], seen[0][key])}
    assert moved == {key for key in home if "adapters" in key}
    length = sum(float((seen[0][key] - home[key]).square().sum()) for key in moved) ** 0.5
    assert length == pytest.approx(0.3, rel=1e-9)


def test_groups_have_norms_of_their_own():
    model = tower()
    ups = [p for name, p in model.named_parameters() if name.endswith(".B")]
    ids = {id(p) for p in ups}
    rest = [p for p in trained(model) if id(p) not in ids]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": ups, "lr": 0.2}], lr=0.1)
    run = Stepper(model, optimizer, dynamics=[MGPOConfig(rho=0.3).build(model, optimizer, 5)])
    train(run, model, 1)
    home, seen = values(model), []

    def loss(x):
        seen.append(values(model))
        return loss_of(model)(x)

    run.step([batch()], loss)
    for kind in (".A", ".B"):
        moved = [key for key in home if key.endswith(kind)]
        length = sum(float((seen[0][key] - home[key]).square().sum()) for key in moved) ** 0.5
        assert length == pytest.approx(0.3, rel=1e-9)


def test_a_skipped_step_puts_back_and_leaves_no_trace():
    model = tower()
    run = stepper(model, MGPOConfig(rho=0.5), optimizer=torch.optim.AdamW)
    train(run, model, 3)
    before, state = values(model), copy.deepcopy(run.dynamics[0].state_dict())
    assert run.step([batch()], lambda x: loss_of(model)(x) * float("nan")).skipped
    assert same(values(model), before)
    for name, entry in run.dynamics[0].state_dict().items():
        assert torch.equal(entry["momentum"], state[name]["momentum"])
        assert (entry["usual"], entry["latest"]) == (state[name]["usual"], state[name]["latest"])


def test_an_exception_puts_back():
    model = tower()
    run = stepper(model, MGPOConfig(rho=0.5))
    train(run, model, 2)
    before = values(model)

    def fails(x):
        assert not same(values(model), before)
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        run.step([batch()], fails)
    assert same(values(model), before)


class Rebuilds(Dynamics):
    """A policy that doubles a tensor, whatever became of the step, before others act."""

    name = "rebuilds"
    controls = True

    def __init__(self, tensor):
        self.tensor = tensor

    def on_step_end(self, context):
        with torch.no_grad():
            self.tensor.mul_(2.0)


class Removes(Dynamics):
    """A policy that takes a layer out."""

    name = "removes"
    controls = True

    def on_step_end(self, context):
        if context.step == 1:
            model = context.model
            places_of(model)[0].remove()
            context.changed = True


def test_nothing_is_kept_of_parameters_that_are_gone():
    """A resumed run, which does not have them, then continues with the same state."""
    model = tower()
    run = stepper(model, MGPOConfig(rho=0.5))
    run.dynamics = (Removes(), *run.dynamics)
    train(run, model, 2)
    state = run.state_dict()["dynamics"]["mgpo"]
    assert 0 < len(state) == len(adapted(model))
    assert set(state) <= dict(model.named_parameters()).keys()


def test_who_edits_parameters_finds_them_in_place_in_a_skipped_step_too():
    model = tower()
    run = stepper(model, MGPOConfig(rho=0.5))
    train(run, model, 2)
    tensor = adapted(model)[0]
    before = tensor.detach().clone()
    run.dynamics = (Rebuilds(tensor), *run.dynamics)
    assert run.step([batch()], lambda x: loss_of(model)(x) * float("nan")).skipped
    assert torch.equal(tensor, 2.0 * before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_resumed_run_repeats_the_whole_one(optimizer):
    def fresh():
        model = tower(dtype=torch.float32)
        return model, stepper(model, MGPOConfig(rho=0.3), optimizer=optimizer)

    def steps(run, model, count):
        for _ in range(count):
            run.step([batch(dtype=torch.float32)], loss_of(model))

    whole, run = fresh()
    steps(run, whole, 6)
    first, half = fresh()
    steps(half, first, 3)
    rest, again = fresh()
    rest.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    again.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    steps(again, rest, 3)
    assert same(values(whole), values(rest))


def test_a_tensor_of_another_shape_starts_afresh():
    model = tower()
    run = stepper(model, MGPOConfig())
    train(run, model, 2)
    state = run.dynamics[0].state_dict()
    other = Tower().to(torch.float64)
    vl.inject(other, "lora", ["first", "second"], rank=3)
    again = stepper(other, MGPOConfig())
    again.dynamics[0].load_state_dict(state)
    before = values(other)
    seen = []

    def loss(x):
        seen.append(values(other))
        return loss_of(other)(x)

    again.step([batch()], loss)
    assert same(before, seen[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "mgpo: rho must not be negative"),
        ({"mu": 1.0}, r"mgpo: mu must lie in \[0, 1\), got 1\.0"),
        ({"beta": -0.1}, r"mgpo: beta must lie in \[0, 1\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MGPOConfig(**options)


def test_a_model_without_a_trained_adapter_is_refused():
    model = Tower()
    with pytest.raises(ConfigError, match="mgpo moves the tensors of adapters"):
        MGPOConfig().build(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
