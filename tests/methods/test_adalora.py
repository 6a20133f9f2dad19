"""AdaLoRA: the budget is kept exactly, masks hold to the end, and a planted change is found."""

import pytest
import torch

import visionlora as vl
from tests.ranks.planted import Problem, ranks
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError
from visionlora.methods.adalora import AdaLoRAConfig
from visionlora.ranks import controllers_of
from visionlora.ranks.importance import orthogonality

STEPS = 40


def setup(problem, **options):
    model = problem.model("adalora", **{"rank": 4, "target": 1.5, "interval": 3, **options})
    parameters = [item for _, item in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.0)
    (controller,) = controllers_of(model, optimizer, STEPS)
    return model, controller, Stepper(model, optimizer, dynamics=[controller])


def open_ranks(controller):
    return sum(int((place.delta.E != 0).sum()) for place in controller.places)


@pytest.fixture(scope="module")
def problem():
    return Problem(noise=0.1)


def test_the_budget_begins_whole_falls_by_a_cube_and_ends_at_the_target(problem):
    _, controller, _ = setup(problem, warmup=0.1, final=0.25)
    budgets = [controller.budget(step) for step in range(STEPS)]
    assert budgets[:5] == [16] * 5
    assert budgets[30:] == [6] * 10
    assert budgets[17] == int(6 + 10 * 0.5**3)
    assert budgets == sorted(budgets, reverse=True)
    assert [step for step in range(31) if controller.due(step)] == [*range(6, 30, 3), 30]


def test_every_choice_keeps_exactly_the_budget_and_the_last_one_is_final(problem):
    model, controller, stepper = setup(problem)
    chosen = None
    for step in range(STEPS):
        due = controller.due(step)
        stepper.step([problem.batches(step)], lambda batch: problem.loss(model, batch))
        if due:
            assert open_ranks(controller) == controller.budget(step)
        if step >= controller.last:
            assert open_ranks(controller) == 6
            masks = [mask.tolist() for mask in controller.masks.values()]
            chosen = chosen or masks
            assert masks == chosen
    vl.finalize(model)
    assert sum(ranks(model).values()) == 6


def test_masked_ranks_may_come_back_between_choices(problem):
    model, controller, stepper = setup(problem)
    for step in range(8):
        stepper.step([problem.batches(step)], lambda batch: problem.loss(model, batch))
    assert open_ranks(controller) == 16 > controller.budget(6)


def test_a_skipped_last_choice_is_made_in_the_next_step(problem):
    model, controller, stepper = setup(problem)
    for step in range(STEPS):
        bad = float("nan") if step == controller.last else 1.0
        stepper.step([problem.batches(step)], lambda batch: bad * problem.loss(model, batch))  # noqa: B023
    assert open_ranks(controller) == 6


def test_a_choice_after_skipped_steps_measures_first(problem):
    model, controller, stepper = setup(problem, final=0.97, warmup=0.0)
    for step in range(controller.last + 2):
        bad = float("nan") if step < controller.last else 1.0
        stepper.step([problem.batches(step)], lambda batch: bad * problem.loss(model, batch))  # noqa: B023
    assert open_ranks(controller) == 6


def test_without_a_final_part_the_last_step_still_reaches_the_target(problem):
    model, controller, stepper = setup(problem, final=0.0, interval=7)
    for step in range(STEPS):
        stepper.step([problem.batches(step)], lambda batch: problem.loss(model, batch))
    assert open_ranks(controller) == 6


def test_orthogonality_vanishes_for_orthonormal_rows_only():
    rows = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0].t()
    assert orthogonality(rows).item() < 1e-12
    assert_close(orthogonality(2 * rows), torch.tensor(3.0 * 3.0**0.5, dtype=torch.float64))


def test_the_scale_does_not_follow_the_rank_that_is_left(problem):
    model, _, _ = setup(problem, alpha=6.0)
    with torch.no_grad():
        for name, item in vl.trainable_parameters(model):
            item.normal_()
            if name.endswith(".E"):
                item[1:] = 0
    expected = model(problem.inputs)
    vl.finalize(model)
    assert set(ranks(model).values()) == {1}
    assert_close(model(problem.inputs), expected)


@pytest.mark.parametrize(
    "changes",
    [{"blocks.1.a": 2}, {"blocks.0.b": 2}, {"blocks.0.a": 1, "blocks.1.a": 2}],
    ids=lambda changes: "+".join(changes),
)
def test_the_planted_layers_and_ranks_are_found(changes, tmp_path):
    problem = Problem(changes=changes, noise=0.1)
    options = {"alpha": 8.0, "orthogonality": 0.1, "interval": 5, "warmup": 0.2}
    model = problem.model("adalora", rank=3, target=sum(changes.values()) / 4, **options)
    problem.fit(model, tmp_path, steps=250, lr=0.03)
    assert ranks(model) == changes
    assert problem.loss(model).item() < 0.1 * problem.loss(problem.base).item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target must be positive"),
        ({"warmup": 0.6, "final": 0.4}, "leave no step"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\)"),
        ({"orthogonality": -1.0}, "orthogonality must not be negative"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoRAConfig(**options)


def test_a_target_above_the_beginning_is_refused_before_training(problem):
    with pytest.raises(ConfigError, match="target of 5 ranks a site is larger than the 4"):
        setup(problem, target=5.0)
