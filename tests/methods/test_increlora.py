"""IncreLoRA: growth to the target, an unchanged function, dense scores, a planted change."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import definition, randomise
from tests.contract.kinds import KINDS
from tests.ranks.planted import Problem, ranks
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, PlainBackend, Stepper
from visionlora.errors import ConfigError
from visionlora.methods.increlora import IncreLoRAConfig
from visionlora.ranks import controllers_of
from visionlora.ranks.optimizer import set_rates
from visionlora.ranks.structure import places_of
from visionlora.ranks.watch import Watched

STEPS = 40
SERVED = [kind for kind in KINDS if not kind.norm]


def setup(problem, steps=STEPS, **options):
    options = {"target": 2.25, "add": 2, "top": 2, "watch": 3, **options}
    model = problem.model("increlora", **options)
    parameters = [p for _, p in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    (controller,) = controllers_of(model, optimizer, steps)
    return model, optimizer, controller, Stepper(model, optimizer, dynamics=[controller])


def run(problem, stepper, optimizer, model, steps=STEPS, look=lambda step: None):
    for step in range(steps):
        set_rates(optimizer, step, 1.0)
        stepper.step([problem.batches(step)], lambda batch: problem.loss(model, batch))
        look(step)


def totals(model):
    return [place.delta.config.total for place in places_of(model)]


@pytest.fixture(scope="module")
def problem():
    return Problem(noise=0.1)


@pytest.mark.parametrize("advance", [True, False])
def test_growth_ends_exactly_at_the_target_and_takes_the_reserve_away(problem, advance):
    model, optimizer, controller, stepper = setup(problem, advance=advance)
    seen = []
    run(problem, stepper, optimizer, model, look=lambda step: seen.append(sum(totals(model))))
    assert seen == sorted(seen)
    assert sorted(set(seen)) == [4, 8, 9]
    assert not controller.growing
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for _, p in vl.trainable_parameters(model)}
    assert all(p.requires_grad for place in places_of(model) for p in place.delta.parameters())
    output = model(problem.inputs)
    vl.finalize(model)
    assert sum(ranks(model).values()) == 9
    assert_close(model(problem.inputs), output)


@pytest.mark.parametrize("advance", [True, False])
def test_growing_leaves_the_function_as_it_was(problem, advance):
    model, _, controller, stepper = setup(problem, advance=advance)
    with torch.no_grad():
        for place in places_of(model):
            place.delta.E[0].fill_(0.3)
    before = []
    grow = controller.grow

    def noted(context):
        before.append(model(problem.inputs).detach())
        grow(context)
        before.append(model(problem.inputs).detach())

    controller.grow = noted
    for step in range(controller.next):
        stepper.step([problem.batches(step)], lambda batch: problem.loss(model, batch))
    one, other = before
    assert_close(one, other, factor=1e6 if advance else 1.0)  # a new reserve adds 1e-5 of itself


def test_the_legacy_scale_shrinks_as_the_rank_grows():
    config = IncreLoRAConfig(alpha=6.0, scale_by="legacy", rank=2)
    assert config.scale == pytest.approx(6.0 / 2.00001)
    assert IncreLoRAConfig(alpha=6.0, scale_by="legacy", rank=2, gained=4).scale < config.scale
    fixed = IncreLoRAConfig(alpha=6.0, target=3.0, rank=2)
    assert fixed.scale == IncreLoRAConfig(alpha=6.0, target=3.0, rank=2, gained=4).scale == 2.0


def test_a_new_group_starts_at_rate_zero_and_rises_by_itself(problem):
    model, optimizer, controller, stepper = setup(problem)
    first, interval = controller.next, controller.interval
    rates = []
    run(problem, stepper, optimizer, model, first + interval,
        lambda step: rates.append([group["lr"] for group in optimizer.param_groups]))  # fmt: skip
    assert [len(rate) for rate in rates] == [1] * (first - 1) + [2] * interval + [3]
    assert rates[first] == [0.02, 0.0]
    assert [rate[1] for rate in rates[first:-1]] == pytest.approx(
        [0.02 * i / interval for i in range(interval - 1)]
    )


def test_the_reserve_is_trained_but_keeps_its_singular_values(problem):
    model, optimizer, controller, stepper = setup(problem)
    place = places_of(model)[0]
    before = [part[-1].detach().clone() for part in (place.delta.P, place.delta.Q)]
    run(problem, stepper, optimizer, model, controller.next - 1)
    assert place.delta.values()[-2:].tolist() == [1e-5, 1e-5]
    for old, part in zip(before, (place.delta.P, place.delta.Q), strict=True):
        assert not torch.equal(old, part[-1])


def test_an_unfinished_adapter_counts_and_exports_no_reserve(problem):
    model, _, _, _ = setup(problem)
    vl.finalize(model)
    assert set(ranks(model).values()) == {1}
    assert sum(p.numel() for _, p in vl.trainable_parameters(model)) == 4 * 16


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("mode", ["auto", "dense"])
def test_the_sensitivity_is_that_of_the_dense_gradient(kind, mode):
    model = vl.inject(kind.model(), "increlora", kind.target, rank=2, mode=mode)
    randomise(model)
    places = places_of(model)
    batches = [kind.inputs(seed) for seed in (0, 1)]

    def backward(outputs):
        for output in outputs:
            weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            (output.reshape(-1) * weight).square().sum().backward()

    leaves = {}
    for place in places:  # the definition, with the change itself as the variable
        leaves[place.key] = place.delta.delta(place.host.view(place.key)).detach().requires_grad_()
        place.delta.delta = lambda weight, key=place.key: leaves[key]
    backward(definition(model, kind, batch) for batch in batches)
    for place in places:
        del place.delta.delta
        place.delta.watching = Watched()
    backward(model(*batch) for batch in batches)
    for place in places:
        delta, leaf = place.delta, leaves[place.key]
        expected = (leaf.grad * leaf.detach()).abs().sum()
        up, down = (factor.detach() for factor in delta.pair())
        for chunk in (None, 3):
            found = delta.watching.sensitivity(
                delta.scale * up, down, place.site.groups, lambda value: value, chunk
            )
            assert_close(found / expected, torch.ones((), dtype=torch.float64))


def test_watching_changes_no_output_and_a_second_pass_replaces_the_first(problem):
    model, _, controller, stepper = setup(problem, watch=100)
    plain = model(problem.inputs)
    for place in places_of(model):
        place.delta.watching = Watched()
    assert_close(model(problem.inputs), plain)

    class Twice(Dynamics):
        name = "twice"
        wants_second_pass = True

        def second_pass(self, context):
            context.backward_again()

    both = []
    for dynamics in ([], [Twice()]):
        model, optimizer, controller, _ = setup(problem, watch=100)
        stepper = Stepper(model, optimizer, dynamics=[*dynamics, controller])
        stepper.step([problem.batches(0)], lambda batch: problem.loss(model, batch))  # noqa: B023
        both.append(controller.importance.state_dict())
    for name, found in both[0].items():
        assert_close(found["change"][0], both[1][name]["change"][0])


class Scaled(PlainBackend):
    """Scales the loss as half precision does."""

    def loss_scale(self):
        return 64.0

    def backward(self, loss):
        (64.0 * loss).backward()

    def unscale(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(64.0)


def test_importance_knows_nothing_of_micro_batches_loss_scale_and_checkpointing(problem):
    def measured(backend=None, parts=1, recompute=False):
        model, optimizer, controller, _ = setup(problem, watch=100)
        stepper = Stepper(model, optimizer, dynamics=[controller], backend=backend)

        def loss(batch):
            inputs, targets = batch
            output = checkpoint(model, inputs, use_reentrant=False) if recompute else model(inputs)
            return (output - targets).square().mean()

        with torch.no_grad():
            for place in places_of(model):
                place.delta.E[0].fill_(0.5)
        pieces = [x.chunk(parts) for x in (problem.inputs, problem.targets)]
        stepper.step(list(zip(*pieces, strict=True)), loss)
        return {
            name: found["change"][0] for name, found in controller.importance.state_dict().items()
        }

    expected = measured()
    assert all(value > 0 for value in expected.values())
    for found in (measured(Scaled()), measured(parts=4), measured(recompute=True)):
        for name, value in expected.items():
            assert_close(found[name] / value, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [{"blocks.1.a": 3}, {"blocks.0.b": 3}],
    ids=lambda changes: "+".join(changes),
)
def test_the_planted_layer_grows(changes, tmp_path):
    problem = Problem(changes=changes, noise=0.1)
    options = {"add": 1, "top": 1, "alpha": 4.0, "orthogonality": 0.1}
    model = problem.model("increlora", target=1.5, **options)
    problem.fit(model, tmp_path, steps=200, lr=0.03)
    ((name, rank),) = changes.items()
    assert ranks(model) == {"blocks.0.a": 1, "blocks.0.b": 1, "blocks.1.a": 1, "blocks.1.b": 1} | {
        name: rank
    }
    assert problem.loss(model).item() < 0.1 * problem.loss(problem.base).item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add": 0}, "add must be at least 1"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"gained": -1}, "gained must not be negative"),
        ({"warmup": 0.7}, "end must lie in"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        IncreLoRAConfig(**options)


def test_a_schedule_that_does_not_fit_is_refused_before_training(problem):
    with pytest.raises(ConfigError, match="2 rounds of growth every 20 steps after 4 do not fit"):
        setup(problem, interval=20)
    with pytest.raises(ConfigError, match="smaller than the 1 that training begins with"):
        setup(problem, target=0.5)
