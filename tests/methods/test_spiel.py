"""SpIEL: what is seen, dropped, grown and remembered, and what it equals at the limits."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import deltas_of, inject, randomise
from tests.contract.kinds import KINDS
from tests.ranks.planted import WIDTH, Problem
from tests.tolerances import assert_close
from visionlora.dynamics import PlainBackend, Stepper
from visionlora.dynamics.sam import SAMConfig
from visionlora.errors import ConfigError
from visionlora.methods.parts.sparse import adam_step, regrow, sm3_step
from visionlora.methods.spiel import SpIELConfig
from visionlora.ranks import controllers_of
from visionlora.ranks.structure import places_of
from visionlora.registry import build_config

STEPS = 24
WEIGHTS = [kind for kind in KINDS if not kind.norm]


@pytest.fixture(scope="module")
def problem():
    return Problem(noise=0.1)


def adamw(model, lr=0.02, **options):
    parameters = [item for _, item in vl.trainable_parameters(model)]
    return torch.optim.AdamW(parameters, lr=lr, **options)


def setup(problem, *, steps=STEPS, dynamics=(), weight_decay=0.0, **options):
    """Return a model, its controller and a stepper; periods of 6 steps, 3 of them observed."""
    model = problem.model("spiel", **{"density": 0.25, "every": 6, "observe": 3, **options})
    optimizer = adamw(model, weight_decay=weight_decay)
    (controller,) = controllers_of(model, optimizer, steps)
    more = [item.build(model, optimizer, steps) for item in dynamics]
    return model, controller, Stepper(model, optimizer, dynamics=[controller, *more])


def train(problem, stepper, steps, start=0):
    for step in range(start, start + steps):
        stepper.step([problem.batches(step)], lambda batch: problem.loss(stepper.model, batch))


def changes(model):
    return {
        place.path: place.delta.delta(place.host.view(place.key)).detach().clone()
        for place in places_of(model)
    }


def dense_gradient(problem, model, batch):
    """Return the gradient of the weights of the merged model, by layer."""
    plain = vl.eject(copy.deepcopy(model), merge=True).requires_grad_(True)
    problem.loss(plain, batch).backward()
    paths = [place.path for place in places_of(model)]
    return {path: plain.get_parameter(f"{path}.weight").grad for path in paths}


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_what_is_seen_in_the_backward_is_the_gradient_of_the_weight(kind, mode):
    if mode == "dense" and kind.name.startswith("mha"):
        return
    base, inputs = kind.model(), kind.inputs()
    model = inject(kind.model(), SpIELConfig(density=0.3), kind, mode=mode)
    seen = {}
    for key, delta in deltas_of(model).items():
        delta.observer = lambda g, key=key: seen.__setitem__(key, seen.get(key, 0) + g)
    weight = torch.randn_like(base(*inputs))
    (base(*inputs) * weight).sum().backward()
    (model(*inputs) * weight).sum().backward()
    for key, delta in deltas_of(model).items():
        name, rows = kind.views[key]
        expected = base.layer.get_parameter(name).grad[rows]
        expected = expected.t() if kind.indices else expected.reshape(len(expected), -1)
        assert_close(seen[key], expected)
        assert_close(delta.values.grad, expected.flatten()[delta.index.long()])


def test_the_entries_start_sorted_distinct_at_zero_and_by_seed():
    def index(seed):
        layer = torch.nn.Sequential(torch.nn.Linear(20, 30))
        delta = deltas(vl.inject(layer, "spiel", density=0.1, seed=seed))["0.weight"]
        assert not delta.values.any()
        return delta.index

    one = index(0)
    assert one.dtype == torch.int32
    assert len(one) == 60
    assert torch.equal(one, one.unique())
    assert torch.equal(one, index(0))
    assert not torch.equal(one, index(1))
    assert len(deltas(vl.inject(torch.nn.Sequential(torch.nn.Linear(9, 9)), "spiel", count=7))) == 1


def deltas(model):
    return {place.name: place.delta for place in places_of(model)}


@pytest.mark.parametrize("selection", ["gradient", "sm3"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_their_number_stays_and_none_is_there_twice(problem, selection, schedule):
    model, controller, stepper = setup(problem, selection=selection, schedule=schedule, rate=0.5)
    held = {name: (delta.values, delta.index) for name, delta in deltas(model).items()}
    start = {name: delta.index.clone() for name, delta in deltas(model).items()}
    for step in range(STEPS):
        train(problem, stepper, 1, step)
        for name, delta in deltas(model).items():
            assert delta.values is held[name][0]
            assert delta.index is held[name][1]
            assert len(delta.index.unique()) == len(delta.values) == 16
            assert 0 <= delta.index.min() <= delta.index.max() < WIDTH**2
    assert controller.selections == 4
    assert any(not torch.equal(start[name], delta.index) for name, delta in deltas(model).items())


def test_the_smallest_are_dropped_and_the_most_wanted_grown():
    index = torch.tensor([3, 8, 1, 6, 0], dtype=torch.int32)
    values = torch.tensor([0.5, -0.1, 0.2, -3.0, 0.05])
    candidates = torch.tensor([6, 2, 8, 9, 7])  # 6 is kept, 8 is dropped and grown at once
    scores = torch.tensor([9.0, 1.0, 5.0, 4.0, 2.0])
    grown = regrow(index, values, candidates, scores, 3, 10)
    assert dict(zip(index.tolist(), values.tolist(), strict=True)) == pytest.approx(
        {3: 0.5, 8: -0.1, 9: 0.0, 6: -3.0, 7: 0.0}
    )
    assert {int(index[slot]): int(candidates[p]) for slot, p in zip(*grown, strict=True)} == {
        9: 9,
        7: 7,
    }


def test_fewer_candidates_leave_the_larger_of_the_smallest():
    index = torch.tensor([3, 8, 1], dtype=torch.int32)
    values = torch.tensor([0.3, -0.1, 0.2])
    regrow(index, values, torch.tensor([3, 5]), torch.tensor([1.0, 1.0]), 2, 10)
    assert dict(zip(index.tolist(), values.tolist(), strict=True)) == pytest.approx(
        {3: 0.3, 1: 0.2, 5: 0.0}
    )


def test_grown_entries_are_where_the_gradient_is_and_start_with_its_moments(problem):
    model, controller, stepper = setup(problem)
    seen = []
    for step in range(3):
        seen.append(dense_gradient(problem, model, problem.batches(step)))
        before = {name: delta.index.clone() for name, delta in deltas(model).items()}
        train(problem, stepper, 1, step)
    for place in places_of(model):
        delta, state = place.delta, controller.moments[place.name]
        gradients = torch.stack([item[place.path].flatten() for item in seen])
        first = set(gradients[0].abs().topk(16).indices.tolist())
        assert set(delta.index.tolist()) == first  # the first selection replaces all
        new = torch.tensor([i not in before[place.name] for i in delta.index.tolist()])
        assert 0 < new.sum() < 16
        assert not delta.values[new].any()
        assert delta.values[~new].all()
        own = gradients[:, delta.index[new].long()]
        assert_close(state["age"], torch.full((16,), 3.0, dtype=torch.float64))
        assert_close(state["mean"][new], own.mean(0) * (1 - 0.9**3))
        assert_close(state["square"][new], own.square().mean(0) * (1 - 0.999**3))


def test_later_selections_drop_the_given_share_of_the_smallest(problem):
    model, controller, stepper = setup(problem, rate=0.5)
    train(problem, stepper, 8)
    before = {n: (d.index.clone(), d.values.detach().clone()) for n, d in deltas(model).items()}
    train(problem, stepper, 1, 8)
    assert controller.selections == 2
    count = int(0.5 * (1 - 9 / STEPS) * 16)
    for name, delta in deltas(model).items():
        index, values = before[name]
        gone = [i not in delta.index for i in index.tolist()]
        # One more step has moved the values since, by at most the learning rate each.
        limit = values.abs().sort().values[count - 1] + 2 * 0.02
        assert sum(gone) <= count
        assert all(v <= limit for v, lost in zip(values.abs(), gone, strict=True) if lost)
        fresh = torch.tensor([i not in index for i in delta.index.tolist()])
        assert not delta.values[fresh].any()
        assert (controller.moments[name]["age"][fresh] == 3).all()


def test_shares_fall_as_the_schedules_say(problem):
    _, linear, _ = setup(problem, steps=100, rate=0.2)
    assert linear.share(3) == 1.0
    linear.selections = 1
    assert [linear.share(t) for t in (25, 50, 100)] == pytest.approx([0.15, 0.1, 0.0])
    _, cosine, _ = setup(problem, steps=100, rate=0.2, schedule="cosine")
    assert [cosine.share(t) for t in (0, 50, 100)] == pytest.approx([0.2, 0.1, 0.0])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_without_replacement_it_is_adamw_on_the_masked_weight(problem, decay):
    model, _, stepper = setup(problem, rate=0.0, schedule="cosine", weight_decay=decay)
    fixed, _, plain = setup(problem, selection="fixed", weight_decay=decay)
    full = problem.model("full")
    masked = Stepper(full, adamw(full, weight_decay=decay))
    for place, sparse in zip(places_of(full), places_of(model), strict=True):
        mask = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        mask.view(-1)[sparse.delta.index.long()] = 1
        place.delta.D.register_hook(lambda g, mask=mask: g * mask)
    for item in (stepper, plain, masked):
        train(problem, item, STEPS)
    expected = changes(full)
    for other in (changes(model), changes(fixed)):
        for path, change in expected.items():
            assert change.any()
            assert_close(other[path], change)


def test_with_all_entries_it_is_full_fine_tuning(problem):
    model, controller, stepper = setup(problem, density=1.0, rate=0.5, weight_decay=0.2)
    full = problem.model("full")
    ordinary = Stepper(full, adamw(full, weight_decay=0.2))
    train(problem, stepper, STEPS)
    train(problem, ordinary, STEPS)
    assert controller.selections == 4
    expected = changes(full)
    for path, change in changes(model).items():
        assert_close(change, expected[path])


def test_ages_correct_every_entry_for_its_own_history():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    values, mean, square, age = (torch.zeros(4, dtype=torch.float64) for _ in range(4))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    for step, gradient in enumerate(gradients):
        if step == 5:  # two entries start anew
            for item in (values, mean, square, age):
                item[:2] = 0
        adam_step(values, gradient, mean, square, age, **options)
    for entry, start in ((0, 5), (1, 5), (2, 0), (3, 0)):
        alone = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        adam = torch.optim.Adam([alone], lr=0.1, betas=(0.9, 0.99))
        for gradient in gradients[start:]:
            alone.grad = gradient[entry : entry + 1]
            adam.step()
        assert_close(values[entry : entry + 1], alone.detach())
    assert age.tolist() == [4, 4, 9, 9]


def test_sm3_on_all_entries_is_sm3_on_the_matrix():
    generator = torch.Generator().manual_seed(0)
    out, width = 3, 5
    dense = torch.zeros(out, width, dtype=torch.float64)
    rows, columns = torch.zeros(out, 1).double(), torch.zeros(1, width).double()
    index = torch.randperm(out * width, generator=generator).int()
    values = torch.zeros(out * width, dtype=torch.float64)
    row, column = torch.zeros(out).double(), torch.zeros(width).double()
    for _ in range(6):
        gradient = torch.randn(out, width, generator=generator, dtype=torch.float64)
        bound = torch.minimum(rows, columns) + gradient.square()
        rows, columns = bound.amax(1, keepdim=True), bound.amax(0, keepdim=True)
        dense = dense * (1 - 0.1 * 0.5) - 0.1 * gradient / bound.sqrt()
        own = gradient.flatten()[index.long()]
        sm3_step(values, own, index, row, column, lr=0.1, weight_decay=0.5)
    assert_close(torch.zeros(out * width).double().index_add(0, index, values).view(3, 5), dense)
    assert_close(row, rows.flatten())
    assert_close(column, columns.flatten())


def test_sm3_grows_where_rows_and_columns_have_had_gradients(problem):
    model, controller, stepper = setup(problem, selection="sm3")
    start = {name: delta.index.clone() for name, delta in deltas(model).items()}
    train(problem, stepper, 3)
    for name, delta in deltas(model).items():
        state = controller.moments[name]
        assert set(state) == {"row", "column"}
        scores = torch.outer(state["row"], state["column"]).flatten()
        wanted = scores.topk(16).values.min()
        assert (scores[delta.index.long()] >= wanted).all()
        assert not torch.equal(delta.index, start[name])


def test_the_optimiser_of_the_run_holds_no_state_for_what_the_controller_trains(problem):
    for selection, count in (("gradient", 0), ("sm3", 0), ("fixed", 4)):
        _, controller, stepper = setup(problem, selection=selection)
        train(problem, stepper, 4)
        assert len(stepper.optimizer.state) == count
        size = {"gradient": 3 * 16, "sm3": 2 * WIDTH, "fixed": 0}[selection]
        held = [sum(t.numel() for t in state.values()) for state in controller.moments.values()]
        assert sum(held) == 4 * size


def course(problem, parts, **options):
    """Train on the same examples in one or several micro-batches per step."""
    model, controller, stepper = setup(problem, **options)
    for step in range(16):
        inputs, targets = problem.batches(step)
        pairs = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
        stepper.step(list(pairs), lambda batch: problem.loss(model, batch))
    return changes(model), controller


def test_accumulated_micro_batches_equal_one_batch(problem):
    whole, one = course(problem, 1)
    parts, four = course(problem, 4)
    assert one.selections == four.selections == 3
    for path, change in whole.items():
        assert_close(parts[path], change)
    first, _ = course(problem, 4, candidates="batch")
    assert any(not torch.allclose(first[path], change) for path, change in whole.items())


class Scaled(PlainBackend):
    """Scales the loss, as half precision does."""

    def loss_scale(self):
        return 1024.0

    def backward(self, loss):
        super().backward(loss * 1024.0)

    def unscale(self, optimizer):
        for group in optimizer.param_groups:
            for item in group["params"]:
                item.grad /= 1024.0


def test_a_scaled_loss_changes_no_number(problem):
    found = []
    for backend in (PlainBackend(), Scaled()):
        model, controller, stepper = setup(problem)
        stepper.backend = backend
        train(problem, stepper, 10)
        found.append((changes(model), controller.moments))
    (one, moments), (other, scaled) = found
    assert all(torch.equal(other[path], change) for path, change in one.items())
    for name, state in moments.items():
        assert all(torch.equal(scaled[name][key], value) for key, value in state.items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear-wide", "qkv-slices", "conv-strided"])
def test_gradient_checkpointing_shows_the_gradient_once(name, reentrant):
    (kind,) = (item for item in WEIGHTS if item.name == name)
    model, inputs = inject(kind.model(), SpIELConfig(density=0.3), kind), kind.inputs()
    seen = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        for delta in deltas_of(model).values():
            delta.observer = lambda g: seen.append(g.clone())
        run(inputs[0].clone().requires_grad_()).square().sum().backward()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(deltas_of(model))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_skipped_step_moves_nothing_and_puts_a_selection_off(problem):
    model, controller, stepper = setup(problem)
    broken = lambda batch: problem.loss(model, batch) * math.nan  # noqa: E731
    stepper.step([problem.batches(0)], broken)
    train(problem, stepper, 1, 1)
    before = changes(model)
    index = {name: delta.index.clone() for name, delta in deltas(model).items()}
    stepper.step([problem.batches(2)], broken)
    assert controller.selections == 0
    for name, delta in deltas(model).items():
        assert torch.equal(index[name], delta.index)
        assert controller.seen[name].steps == 1
    assert all(torch.equal(before[path], change) for path, change in changes(model).items())
    train(problem, stepper, 1, 3)
    assert controller.selections == 1
    age = controller.moments[next(iter(index))]["age"]
    assert set(age.tolist()) == {2.0}
    assert all(torch.isfinite(change).all() for change in changes(model).values())


def test_nothing_is_selected_that_could_not_be_trained(problem):
    for steps, selections in ((3, 0), (4, 1), (9, 1), (10, 2)):
        _, controller, stepper = setup(problem, steps=steps)
        train(problem, stepper, steps)
        assert controller.selections == selections
        assert all(place.delta.observer is None for place in controller.places)


def test_a_second_look_at_the_loss_is_what_is_seen(problem):
    model, controller, stepper = setup(problem, dynamics=[SAMConfig(rho=0.2)])
    _, plain, other = setup(problem)
    for item in (stepper, other):
        train(problem, item, 2)
    for name, seen in controller.seen.items():
        assert seen.steps == 2
        shared = set(seen.candidates.tolist()) & set(plain.seen[name].candidates.tolist())
        assert shared
        assert not torch.equal(seen.total, plain.seen[name].total)
    assert len(places_of(model)) == 4


def test_an_exception_in_a_step_stops_the_looking(problem):
    model, _, stepper = setup(problem)

    def failing(batch):
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        stepper.step([None], failing)
    assert all(place.delta.observer is None for place in places_of(model))


def test_a_file_holds_values_and_positions_in_eight_bytes_each(problem, tmp_path):
    model, _, stepper = setup(problem)
    train(problem, stepper, 10)
    path = vl.save(model.float(), tmp_path / "adapter.safetensors")
    tensors = load_file(path)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 8 * 4 * 16
    expected = model(problem.inputs.float())
    base = problem.model("lora").float()
    for target in (vl.eject(base), problem.model("spiel", density=0.25).float()):
        loaded = vl.load(target, path)
        assert torch.equal(loaded(problem.inputs.float()), expected)
        again = vl.save(loaded, tmp_path / "again.safetensors")
        for key, value in load_file(again).items():
            assert torch.equal(value, tensors[key])
    with vl.merged(model):
        assert_close(model(problem.inputs.float()), expected)


def test_planted_entries_are_found(tmp_path):
    problem = Problem()
    planted = set(torch.randperm(64, generator=torch.Generator().manual_seed(1))[:6].tolist())
    with torch.no_grad():
        truth = problem.model("full")
        truth.get_submodule("blocks.1.a").adapters["default"]["weight"].D.view(-1)[
            list(planted)
        ] = 2.0
        problem.targets = truth(problem.inputs)
    start = problem.loss(problem.base).item()
    found, losses = {}, {}
    for selection in ("gradient", "fixed"):
        model = problem.model("spiel", count=6, selection=selection)
        problem.fit(model, tmp_path / selection, steps=160, lr=0.05)
        losses[selection] = problem.loss(model).item()
        index = deltas(model)["blocks.1.a.weight"].index.tolist()
        found[selection] = len(planted.intersection(index))
    assert found["gradient"] >= 4 > found["fixed"]
    assert losses["gradient"] < 0.2 * start < losses["fixed"]


def test_density_is_loras_budget_at_two_ranks_per_width():
    spiel = SpIELConfig(density=2 * 8 / 768)
    lora = vl.get_method("lora").delta.parameter_count(build_config("lora", {"rank": 8}), 768, 768)
    assert spiel.entries(768, 768) == lora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.1}, r"density must lie in \(0, 1\], got 1.1"),
        ({"count": 0}, "count must be at least 1 or None, got 0"),
        ({"observe": 21}, r"observe must lie between 1 and every \(20\), got 21"),
        ({"observe": 0}, r"observe must lie between 1 and every \(20\), got 0"),
        ({"rate": 1.5}, r"rate must lie in \[0, 1\], got 1.5"),
        ({"selection": "random"}, "selection must be one of 'gradient', 'sm3', 'fixed'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SpIELConfig(**options)


def test_more_entries_than_the_weight_has_are_refused():
    with pytest.raises(ConfigError, match=r"49 entries are more than 0\.weight has: its view is"):
        vl.inject(torch.nn.Sequential(torch.nn.Linear(8, 6)), "spiel", count=49)


def test_random_values_do_not_change_what_is_trained(problem):
    model, _, _ = setup(problem)
    randomise(model)
    assert all((change != 0).sum() == 16 for change in changes(model).values())
