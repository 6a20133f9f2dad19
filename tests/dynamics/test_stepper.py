"""The laws of one training step: order of events, accumulation, skipping, reach, second pass."""

import copy
import math

import pytest
import torch
from torch import nn

from visionlora.dynamics import Dynamics, PlainBackend, Stepper
from visionlora.errors import ConfigError, NeverTrainedError, VisionLoraError

ORDER = ["on_step_begin", "second_pass", "on_grads_ready", "on_grads_clipped", "on_step_end"]


class Recorder(Dynamics):
    """Notes the event, the gradient norm and the first parameter at each event."""

    name = "recorder"

    def __init__(self, wants_second_pass=False):
        self.wants_second_pass = wants_second_pass
        self.seen = []

    def _note(self, event, context):
        parameter = context.parameters[0]
        norm = None if parameter.grad is None else float(parameter.grad.norm())
        self.seen.append((event, norm, parameter.detach().clone(), context.skipped))

    def on_step_begin(self, context):
        self._note("on_step_begin", context)

    def second_pass(self, context):
        self._note("second_pass", context)

    def on_grads_ready(self, context):
        self._note("on_grads_ready", context)

    def on_grads_clipped(self, context):
        self._note("on_grads_clipped", context)

    def on_step_end(self, context):
        self._note("on_step_end", context)

    @property
    def events(self):
        return [event for event, *_ in self.seen]


class Sharpness(Dynamics):
    """A plain SAM: the gradient at a distance `rho` uphill replaces the gradient."""

    name = "sharpness"
    wants_second_pass = True

    def __init__(self, rho):
        self.rho = rho

    def second_pass(self, context):
        parameters = context.parameters
        kept = [p.detach().clone() for p in parameters]
        gradients = [p.grad for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(self.rho * gradient / norm)
        context.backward_again()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=generator, dtype=torch.float64)


def mean_square(model):
    return lambda batch: model(batch).square().mean()


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def state(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_events_come_in_the_fixed_order(model, data):
    recorder = Recorder(wants_second_pass=True)
    Stepper(model, sgd(model), dynamics=[recorder]).step([data], mean_square(model))
    assert recorder.events == ORDER


def test_second_pass_is_only_offered_to_who_asked(model, data):
    recorder = Recorder()
    Stepper(model, sgd(model), dynamics=[recorder]).step([data], mean_square(model))
    assert recorder.events == [event for event in ORDER if event != "second_pass"]


def test_gradients_and_parameters_are_where_the_events_say(model, data):
    recorder = Recorder()
    stepper = Stepper(model, sgd(model), dynamics=[recorder], clip_norm=1e-3)
    report = stepper.step([data], mean_square(model))
    begin, ready, clipped, end = recorder.seen
    assert begin[1] is None
    assert ready[1] > clipped[1]
    assert clipped[1] <= 1e-3 < report.grad_norm
    assert torch.equal(begin[2], clipped[2])
    assert not torch.equal(clipped[2], end[2])
    assert end[1] is not None
    assert all(p.grad is None for p in model.parameters())


def test_accumulated_micro_batches_equal_one_batch(model, data):
    other = copy.deepcopy(model)
    whole = Stepper(model, sgd(model), clip_norm=0.05)
    parts = Stepper(other, sgd(other), clip_norm=0.05)
    for _ in range(3):
        one = whole.step([data], mean_square(model))
        four = parts.step(list(data.split(4)), mean_square(other))
        assert one.loss == pytest.approx(four.loss, rel=1e-12)
        assert one.grad_norm == pytest.approx(four.grad_norm, rel=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_clipping_bounds_the_global_norm(model, data):
    before = state(model)
    Stepper(model, sgd(model, lr=1.0), clip_norm=0.01).step([data], mean_square(model))
    moved = [a - b for a, b in zip(before, state(model), strict=True)]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved))
    assert norm == pytest.approx(0.01, rel=1e-6)


def test_only_the_last_micro_batch_synchronises(model, data):
    entered = []

    class Watching(PlainBackend):
        def no_sync(self, model):
            entered.append(model)
            return super().no_sync(model)

    stepper = Stepper(model, sgd(model), backend=Watching())
    stepper.step(list(data.split(4)), mean_square(model))
    assert entered == [model] * 3


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_step_changes_nothing_and_is_counted(model, data, poison):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recorder = Recorder()
    stepper = Stepper(model, optimizer, dynamics=[recorder])
    stepper.step([data], mean_square(model))
    before, moments = state(model), copy.deepcopy(optimizer.state_dict())

    def poisoned(batch):
        loss = mean_square(model)(batch)
        if poison == "loss":
            return loss * float("nan")
        return loss + (model[0].weight * 0.0).sum().sqrt()  # value 0, infinite slope

    report = stepper.step([data, data], poisoned)
    assert report.skipped
    assert stepper.skipped == 1
    assert math.isfinite(report.loss) == (poison == "gradient")
    assert same(before, state(model))
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, moments["state"][key][name])
    assert recorder.events[-2:] == ["on_step_begin", "on_step_end"]
    assert recorder.seen[-1][3] is True
    assert not stepper.step([data], mean_square(model)).skipped


def test_a_non_finite_gradient_from_a_dynamics_is_not_applied(model, data):
    class Breaking(Dynamics):
        def on_grads_clipped(self, context):
            context.parameters[0].grad.fill_(float("inf"))

    before = state(model)
    report = Stepper(model, sgd(model), dynamics=[Breaking()]).step([data], mean_square(model))
    assert report.skipped
    assert same(before, state(model))


def test_too_many_skipped_steps_in_a_row_end_the_training(model, data):
    stepper = Stepper(model, sgd(model), max_skipped=3)
    bad = lambda batch: mean_square(model)(batch) * float("nan")  # noqa: E731
    for loss_fn in (bad, bad, mean_square(model), bad, bad):
        stepper.step([data], loss_fn)
    with pytest.raises(VisionLoraError, match=r"diverged.* 3 skipped steps in a row"):
        stepper.step([data], bad)


def test_a_parameter_without_gradient_is_named_before_anything_changes(model, data):
    model.register_module("bypassed", nn.Linear(2, 2))
    before = state(model)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    with pytest.raises(
        NeverTrainedError, match=r"2 trainable .*bypassed\.weight, bypassed\.bias.*mode='dense'"
    ):
        stepper.step([data], lambda batch: model[2](model[1](model[0](batch))).mean())
    assert same(before, state(model))


def test_a_frozen_parameter_in_the_optimizer_is_no_fault(model, data):
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    Stepper(model, sgd(model)).step([data], mean_square(model))
    assert torch.equal(frozen, model[0].weight)


def test_a_loss_that_depends_on_nothing_is_refused(model, data):
    with pytest.raises(NeverTrainedError, match="does not depend"):
        Stepper(model, sgd(model)).step([data], lambda batch: batch.mean())
    with pytest.raises(ConfigError, match=r"one scalar tensor, got \(16, 1\)"):
        Stepper(model, sgd(model)).step([data], model)


def test_nothing_to_train_is_refused(model):
    model.requires_grad_(False)
    with pytest.raises(NeverTrainedError, match="no trainable parameter"):
        Stepper(model, sgd(model))


def test_two_second_passes_are_refused_before_training(model):
    one, two = Recorder(wants_second_pass=True), Sharpness(0.1)
    with pytest.raises(ConfigError, match="at most one dynamics"):
        Stepper(model, sgd(model), dynamics=[one, two])


def test_two_dynamics_of_one_name_are_refused(model):
    with pytest.raises(ConfigError, match="share the name 'recorder'"):
        Stepper(model, sgd(model), dynamics=[Recorder(), Recorder()])


def test_running_the_model_again_needs_the_second_pass(model, data):
    class Greedy(Dynamics):
        def on_grads_ready(self, context):
            context.backward_again()

    with pytest.raises(ConfigError, match="wants_second_pass"):
        Stepper(model, sgd(model), dynamics=[Greedy()]).step([data], mean_square(model))


def test_second_pass_gradient_on_a_quadratic_is_exact():
    """At the shifted point the gradient of x'Hx/2 is Hx + rho * H(Hx)/|Hx|."""
    hessian = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    point = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    model = nn.ParameterList([nn.Parameter(point.clone())])
    stepper = Stepper(model, sgd(model, lr=1.0), dynamics=[Sharpness(0.05)])
    # Two micro-batches: one perturbation for both, from their mean gradient.
    stepper.step([0.5, 1.5], lambda weight: weight * (model[0] @ hessian @ model[0]) / 2)
    slope = hessian @ point
    expected = point - (slope + 0.05 * hessian @ slope / slope.norm())
    torch.testing.assert_close(model[0].detach(), expected, rtol=1e-12, atol=1e-12)


def test_second_pass_repeats_dropout_and_leaves_running_statistics():
    """With no shift between the passes, two passes train exactly as one."""

    def run(dynamics):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        stepper = Stepper(model, sgd(model), dynamics=dynamics)
        inputs = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            stepper.step(list(inputs), mean_square(model))
        return list(model.state_dict().values()), torch.get_rng_state()

    plain, plain_rng = run([])
    twice, twice_rng = run([Sharpness(0.0)])
    assert same(plain, twice)
    assert torch.equal(plain_rng, twice_rng)


def test_state_round_trip_keeps_counters_and_dynamics(model, data):
    class Counting(Dynamics):
        name = "counting"
        count = 0

        def on_step_end(self, context):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    stepper = Stepper(model, sgd(model), dynamics=[Counting()])
    stepper.step([data], mean_square(model))
    stepper.step([data], lambda batch: mean_square(model)(batch) * float("nan"))
    fresh = Stepper(model, sgd(model), dynamics=[Counting()])
    fresh.load_state_dict(stepper.state_dict())
    assert fresh.state_dict() == stepper.state_dict()
    assert (fresh.steps, fresh.skipped, fresh.dynamics[0].count) == (2, 1, 2)
    with pytest.raises(ConfigError, match="counting"):
        Stepper(model, sgd(model)).load_state_dict(stepper.state_dict())


class Decay(Dynamics):
    """A square penalty, which notes the micro-batches that it is asked for."""

    name = "decay"

    def __init__(self, parameters):
        self.parameters = parameters
        self.asked = []

    def penalty(self, context):
        self.asked.append(context.micro_batch)
        return 0.3 * sum(p.square().sum() for p in self.parameters)


def test_a_penalty_is_added_to_every_micro_batch_and_divided_as_the_loss_is(model, data):
    twin = copy.deepcopy(model)
    decay = Decay(list(model.parameters()))
    stepper = Stepper(model, sgd(model), dynamics=[decay])
    report = stepper.step([data[:8], data[8:]], mean_square(model))
    optimizer = sgd(twin)
    loss = mean_square(twin)(data)
    (loss + 0.3 * sum(p.square().sum() for p in twin.parameters())).backward()
    optimizer.step()
    assert decay.asked == [0, 1]
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)  # comparable between methods
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_penalty_that_is_not_finite_skips_the_step(model, data):
    decay = Decay([p * math.inf for p in model.parameters()])
    before = state(model)
    assert Stepper(model, sgd(model), dynamics=[decay]).step([data], mean_square(model)).skipped
    assert same(state(model), before)


def test_a_second_pass_has_the_penalty_too(model, data):
    decay = Decay(list(model.parameters()))
    Stepper(model, sgd(model), dynamics=[Sharpness(0.1), decay]).step([data], mean_square(model))
    assert decay.asked == [0, 0]


def test_a_penalty_does_not_hide_that_the_loss_misses_a_parameter(model, data):
    lost = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("lost", lost)

    class Silent(Dynamics):
        name = "silent"

        def on_grads_ready(self, context):
            lost.grad = torch.zeros_like(lost)

    with pytest.raises(NeverTrainedError, match="lost"):
        Stepper(model, sgd(model), dynamics=[Silent()]).step([data], mean_square(model))


def test_those_who_control_parameters_come_before_those_who_edit_them(model, data):
    class Control(Recorder):
        name = "control"
        controls = True

    first, second = Recorder(), Control()
    stepper = Stepper(model, sgd(model), dynamics=[first, second])
    assert stepper.dynamics == (second, first)


def test_after_a_change_of_parameters_the_new_ones_must_be_reached(model, data):
    class Adds(Dynamics):
        name = "adds"

        def on_step_end(self, context):
            if context.step == 0:
                context.model.register_parameter("late", nn.Parameter(torch.ones(2).double()))
                context.optimizer.add_param_group({"params": [context.model.late]})
                context.changed = True

    stepper = Stepper(model, sgd(model), dynamics=[Adds()])
    assert stepper.step([data], mean_square(model)).changed
    with pytest.raises(NeverTrainedError, match="late"):
        stepper.step([data], mean_square(model))


def test_tensors_that_the_model_no_longer_has_are_named_as_that(model, data):
    stray = nn.Parameter(torch.ones(2).double())
    stepper = Stepper(model, torch.optim.SGD([stray], lr=0.1))
    with pytest.raises(NeverTrainedError, match="holds 1 tensors that the model does not have"):
        stepper.step([data], mean_square(model))
