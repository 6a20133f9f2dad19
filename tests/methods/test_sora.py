"""SoRA: the proximal map, gates that close and open, the schedule, and a planted change."""

import math

import pytest
import torch

import visionlora as vl
from tests.ranks.planted import Problem, ranks
from tests.tolerances import assert_close
from visionlora.dynamics import StepContext, Stepper
from visionlora.errors import ConfigError
from visionlora.methods.sora import SoRAConfig, shrink
from visionlora.ranks import controllers_of
from visionlora.ranks.structure import places_of


def setup(problem, *, lr=0.05, **options):
    model = problem.model("sora", rank=3, **options)
    parameters = [item for _, item in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    (controller,) = controllers_of(model, optimizer, 20)
    return model, optimizer, controller, Stepper(model, optimizer, dynamics=[controller])


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.parametrize("xi", [0.0, 0.03, 0.4])
def test_shrinking_is_the_minimiser_of_its_proximal_problem(xi):
    grid = torch.linspace(-1.5, 1.5, 30001, dtype=torch.float64)
    for value in (-1.2, -0.4, -0.05, 0.0, 0.01, 0.5):
        cost = 0.5 * (grid - value).square() + xi * grid.abs()
        found = shrink(torch.tensor([value], dtype=torch.float64), xi)
        assert abs(found.item() - grid[cost.argmin()].item()) <= 1e-4


def test_the_legacy_threshold_closes_what_lands_below_xi():
    gate = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.35, -0.15, -0.2, -0.4], dtype=torch.float64)
    expected = [0.0, 0.1, 0.0, 0.1, 0.25, 0.0, -0.1, -0.3]
    assert_close(shrink(gate, 0.1, legacy=True), torch.tensor(expected, dtype=torch.float64))
    proximal = [0.0, 0.0, 0.05, 0.1, 0.25, -0.05, -0.1, -0.3]
    assert_close(shrink(gate, 0.1), torch.tensor(proximal, dtype=torch.float64))


def test_gates_have_a_group_of_their_own_without_decay(problem):
    model, optimizer, controller, _ = setup(problem)
    main, own = optimizer.param_groups
    assert {id(item) for item in own["params"]} == {id(gate) for gate in controller.gates}
    assert len(main["params"]) == 2 * len(places_of(model))
    assert (main["weight_decay"], own["weight_decay"]) == (0.1, 0.0)
    grouped = torch.optim.AdamW(vl.parameter_groups(model, 0.1, 0.2), lr=0.1)
    assert [group["weight_decay"] for group in grouped.param_groups] == [0.2, 0.0]


@pytest.mark.parametrize("times_lr", [False, True])
def test_a_step_is_the_optimisers_step_and_then_the_proximal_map(problem, times_lr):
    runs = []
    for xi in (0.0, 0.3):
        model, _, controller, stepper = setup(problem, xi=xi, times_lr=times_lr)
        stepper.step([None], lambda _: problem.loss(model))  # noqa: B023
        runs.append([gate.detach().clone() for gate in controller.gates])
    for free, shrunk in zip(*runs, strict=True):
        assert_close(shrunk, shrink(free, 0.3 * (0.05 if times_lr else 1.0)))


def test_a_closed_gate_opens_only_by_a_step_of_more_than_xi(problem):
    for lr, xi, opens in ((0.05, 0.06, False), (0.05, 0.04, True)):  # a first Adam step is lr long
        model, _, controller, stepper = setup(problem, lr=lr, xi=xi, l1=0.0)
        with torch.no_grad():
            for place in places_of(model):
                place.delta.get_parameter("B").normal_()
            for gate in controller.gates:
                gate.zero_()
        stepper.step([None], lambda _: problem.loss(model))  # noqa: B023
        assert all(bool((gate != 0).all()) is opens for gate in controller.gates)


def test_a_skipped_step_shrinks_nothing(problem):
    model, _, controller, stepper = setup(problem, xi=0.3)
    before = [gate.detach().clone() for gate in controller.gates]
    report = stepper.step([None], lambda _: problem.loss(model) * math.nan)
    assert report.skipped
    assert all(torch.equal(*pair) for pair in zip(controller.gates, before, strict=True))


def test_the_penalty_is_the_mean_size_of_all_gates(problem):
    model, optimizer, controller, _ = setup(problem, l1=0.7)
    gates = torch.cat([gate.detach() for gate in controller.gates])
    context = StepContext(0, model, optimizer, replay=lambda: None)
    assert_close(controller.penalty(context), 0.7 * gates.abs().mean())


def test_values_of_xi_are_spaced_as_their_names_say():
    def values(schedule):
        return SoRAConfig(xi=0.1, xi_max=0.9, stages=3, schedule=schedule).thresholds()

    assert values("linear") == pytest.approx([0.1, 0.5, 0.9])
    assert values("exp_linear") == pytest.approx([0.1, 0.3, 0.9])
    middle = math.log((math.exp(0.1) + math.exp(0.9)) / 2)
    assert values("log_linear") == pytest.approx([0.1, middle, 0.9])


def test_stages_follow_each_other_and_are_recorded(problem):
    model, _, controller, stepper = setup(problem, xi=1e-3, xi_max=0.4, stages=3, first=0.5)
    assert [controller.stage(step) for step in range(20)] == [0] * 10 + [1] * 5 + [2] * 5
    for _ in range(20):
        stepper.step([None], lambda _: problem.loss(model))
    assert [item["step"] for item in controller.history] == [10, 15, 20]
    assert [item["xi"] for item in controller.history] == pytest.approx([1e-3, 0.2005, 0.4])
    counts = [item["open"] for item in controller.history]
    assert counts[0] == 12 > counts[1] >= counts[2]


def test_the_planted_layer_and_rank_are_found(problem, tmp_path):
    model = problem.model("sora", rank=4, xi=1e-3, l1=0.02, alpha=8.0)
    problem.fit(model, tmp_path, steps=300, lr=0.03)
    assert {name: rank for name, rank in ranks(model).items() if rank} == problem.changes
    assert problem.loss(model).item() < 2e-3 * problem.loss(problem.base).item()
    trained = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert trained == sum(rank * 16 for rank in problem.changes.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xi": -1.0}, "xi must not be negative"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"stages": 2}, "2 stages need 0 < xi <= xi_max"),
        ({"stages": 2, "xi": 0.0, "xi_max": 1.0}, "2 stages need 0 < xi <= xi_max"),
        ({"first": 1.0}, "first must lie between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SoRAConfig(**options)
