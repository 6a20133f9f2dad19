"""DiffoRA: the search alternates, the choice is exact, pairs are shared, phi leaves no trace."""

import pytest
import torch
from safetensors.torch import load_file

import visionlora as vl
from tests.ranks.planted import Problem
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError
from visionlora.methods.diffora import DiffoRAConfig, layer_and_type
from visionlora.ranks import controllers_of
from visionlora.ranks.structure import places_of
from visionlora.record import SHARED
from visionlora.sites import Site
from visionlora.training import RunDirectory, TrainSettings, fit

STEPS = 40


def setup(problem, **options):
    model = problem.model("diffora", **{"rank": 2, "search": 0.5, "warmup": 0.1, **options})
    parameters = [p for _, p in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    (controller,) = controllers_of(model, optimizer, STEPS)
    return model, optimizer, controller, Stepper(model, optimizer, dynamics=[controller])


def step(problem, model, stepper, number):
    return stepper.step([problem.batches(number)], lambda batch: problem.loss(model, batch))


def matrix(model):
    return getattr(model, SHARED)["default"]


def chosen(model):
    return [place.path for place in places_of(model) if list(place.delta.parameters())]


@pytest.fixture(scope="module")
def problem():
    return Problem(changes={"blocks.0.b": 2, "blocks.1.a": 2})


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("visual.blocks.3.attn.qkv", "visual.blocks.3", "attn.qkv.q"),
        ("layers.0.blocks.1.mlp.0", "layers.0.blocks.1", "mlp.0.q"),
        ("layer1.0.conv1", "layer1.0", "conv1.q"),
        ("0", "", "0.q"),
        ("head", "", "head.q"),
    ],
)
def test_layers_end_at_the_last_number_inside_a_name(module, layer, kind):
    assert layer_and_type(Site(module, "q", "linear", 4, 4)) == (layer, kind)


def test_gates_start_at_one_and_have_mean_one_in_every_layer(problem):
    model = problem.model("diffora")
    with torch.no_grad():
        for place in places_of(model):
            assert matrix(model).gate(place.site).item() == 1.0
        for logits in matrix(model).logits:
            logits.normal_()
    gates = [matrix(model).gate(place.site) for place in places_of(model)]
    assert_close(torch.stack(gates).reshape(2, 2).mean(1), torch.ones(2, dtype=torch.float64))
    assert vl.summary(model).trainable == 4 * 8 * 16 + 4


def test_factors_and_logits_take_turns_after_the_warm_up(problem):
    model, optimizer, controller, stepper = setup(problem)
    logits = controller.logits
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 3e-3]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.999)
    for number in range(controller.last - 1):
        before = [p.detach().clone() for p in logits], places_of(model)[0].delta.B.detach().clone()
        step(problem, model, stepper, number)
        moved = any(not torch.equal(*pair) for pair in zip(logits, before[0], strict=True))
        assert moved is controller.held_out(number) is (number >= 4 and number % 2 == 1)
        assert torch.equal(places_of(model)[0].delta.B, before[1]) is moved


@pytest.mark.parametrize("sharing", ["share", "drop"])
def test_the_choice_is_exact_and_everything_starts_anew(problem, sharing):
    model, optimizer, controller, stepper = setup(problem, sharing=sharing)
    fresh = problem.model("diffora", rank=2)
    for number in range(controller.last - 1):
        step(problem, model, stepper, number)
    with torch.no_grad():
        for logits, best in zip(controller.logits, (1, 0), strict=True):
            logits.zero_()[best] = 1.0
    report = step(problem, model, stepper, controller.last - 1)
    assert report.changed
    assert chosen(model) == ["blocks.0.b", "blocks.1.a"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for _, p in vl.trainable_parameters(model)}
    assert not optimizer.state
    assert_close(model(problem.inputs), problem.base(problem.inputs))
    for place, first in zip(places_of(model), places_of(fresh), strict=False):
        if place.path == first.path and place.path in chosen(model):
            assert torch.equal(place.delta.A, first.delta.A)
    count = 2 * 2 * 16 + (2 * 2 * 16 if sharing == "share" else 0)
    assert vl.summary(model).trainable == count
    plan = [(place.site, place.delta.config) for place in places_of(model)]
    sites = [site for site, _ in plan]
    kind = vl.get_method("diffora")
    closed = sum(kind.delta.parameter_count(c, s.out_features, s.in_features) for s, c in plan)
    assert closed + kind.shared.parameter_count(plan[0][1], sites) == count
    if sharing == "drop":
        assert [place.path for place in places_of(model)] == chosen(model)
    step(problem, model, stepper, controller.last)


def test_ties_go_to_the_first_site(problem):
    _, _, controller, _ = setup(problem)
    assert controller.choice() == "1010"
    _, _, whole, _ = setup(problem, keep=1.0)
    assert whole.choice() == "1111"


def test_the_gradient_of_a_shared_pair_is_the_sum_over_its_users():
    problem = Problem(depth=3, changes={"blocks.1.a": 2})
    model = problem.model("diffora", rank=2, chosen="101010")
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.normal_()
    users = [place for place in places_of(model) if not list(place.delta.parameters())]
    assert [place.path for place in users] == ["blocks.0.b", "blocks.1.b", "blocks.2.b"]
    A, B = matrix(model).A[0], matrix(model).B[0]
    (whole,) = torch.autograd.grad(problem.loss(model), B)
    copies = [B.detach().clone().requires_grad_() for _ in users]
    for place, copy in zip(users, copies, strict=True):
        place.delta.factors = lambda copy=copy: (copy, A)
    parts = torch.autograd.grad(problem.loss(model), copies)
    assert all(part.abs().max() > 0 for part in parts)
    assert_close(sum(parts), whole)


@pytest.mark.parametrize("sharing", ["share", "drop"])
def test_the_planted_layers_are_chosen_and_phi_is_not_saved(problem, sharing, tmp_path):
    model = problem.model("diffora", rank=2, search=0.4, search_lr=0.05, sharing=sharing)
    problem.fit(model, tmp_path / "run", steps=200, lr=0.03)
    assert chosen(model) == list(problem.changes)
    assert problem.loss(model).item() < 0.1 * problem.loss(problem.base).item()
    path = vl.save(model, tmp_path / "adapter.safetensors")
    assert not any("logits" in key for key in load_file(path))
    fresh = vl.load(Problem(changes=problem.changes).base, path)
    assert torch.equal(fresh(problem.inputs), model(problem.inputs))
    assert vl.summary(fresh).trainable == vl.summary(model).trainable


@pytest.mark.parametrize("apart", [True, False])
def test_the_steps_of_phi_get_the_held_out_data(problem, apart, tmp_path):
    model = problem.model("diffora", rank=2, search=0.5, warmup=0.1)
    seen = {"train": [], "apart": []}

    def source(name):
        return lambda index: seen[name].append(index) or problem.batches(index)

    fit(
        model,
        torch.optim.AdamW([p for _, p in vl.trainable_parameters(model)], lr=0.05),
        problem.loss,
        source("train"),
        TrainSettings(steps=STEPS, device="cpu"),
        RunDirectory(tmp_path),
        held_out=source("apart") if apart else None,
    )
    expected = [5, 7, 9, 11, 13, 15, 17, 19] if apart else []
    assert seen["apart"] == expected
    assert seen["train"] == [step for step in range(STEPS) if step not in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]"),
        ({"search": 0.05}, "0 <= warmup < search < 1"),
        ({"search_lr": 0.0}, "search_lr must be positive"),
        ({"chosen": "012"}, "chosen must consist of 0 and 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DiffoRAConfig(**options)


def test_a_choice_for_another_number_of_sites_is_refused(problem):
    with pytest.raises(ConfigError, match="chosen has 3 digits, but there are 4 sites"):
        problem.model("diffora", chosen="101")
