"""The planted teacher is what it says, and its table continues and covers the registry."""

import json
import math

import pytest
import torch

import visionlora as vl
from benchmarks.climb import climb
from benchmarks.planted import SEEDS as TABLE_SEEDS
from benchmarks.planted import STEPS, VALIDATION_SEEDS, default_products, main
from benchmarks.teacher import RANK, Curve, Problem, loss, options_of, train
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.registry import list_dynamics, list_initialisers, list_presets


def test_the_teacher_is_the_base_plus_a_change_of_the_rank_everywhere():
    problem = Problem(1)
    base, teacher = (dict(item.named_parameters()) for item in (problem.base(), problem.teacher))
    assert len(base) == 4
    for name, weight in base.items():
        values = torch.linalg.svdvals((teacher[name] - weight).detach())
        assert_close(values[:RANK], torch.ones(RANK))
        assert values[RANK:].max() < 1e-5


def test_a_change_of_the_rank_reaches_a_loss_of_zero():
    problem = Problem(1)
    model = vl.inject(problem.base(), "lora", rank=RANK)
    teacher = dict(problem.teacher.named_parameters())
    with torch.no_grad():
        for path in ("blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"):
            layer = model.get_submodule(path)
            (delta,) = (item for item in layer.modules() if hasattr(item, "A"))
            U, S, V = torch.linalg.svd(teacher[f"{path}.weight"] - layer.weight)
            delta.B.copy_(U[:, :RANK] * S[:RANK])
            delta.A.copy_(V[:RANK])
        before = loss(problem.base(), problem.held_out)
        assert loss(model, problem.held_out) < 1e-9 * before


def test_a_problem_follows_from_its_seed_and_no_batch_comes_twice():
    one, same, other = Problem(1), Problem(1), Problem(2)
    assert torch.equal(one.batch(5)[1], same.batch(5)[1])
    assert torch.equal(one.held_out[1], same.held_out[1])
    inputs = [one.batch(0), one.batch(1), other.batch(0), *one.batches()]
    assert len({float(batch[0].sum()) for batch in inputs}) == len(inputs)
    assert not set(TABLE_SEEDS) & set(VALIDATION_SEEDS)


@pytest.mark.parametrize("name", default_products())
def test_every_product_trains_and_counts_what_it_trains(name):
    recipe = vl.parse(name)
    curve = train(recipe, 0.001, Problem(1), steps=3)
    assert len(curve.losses) == 3
    assert all(map(math.isfinite, curve.losses))
    assert curve.parameters <= (4 * 32 * 64 if recipe.method == "full" else 2000)
    assert options_of(recipe, 1)["seed"] == 1


def test_all_presets_and_all_their_factors_are_measured():
    recipes = [vl.parse(name) for name in default_products()]
    dynamics = {item.name for recipe in recipes for item in recipe.dynamics}
    starts = {recipe.init.name for recipe in recipes if recipe.init is not None}
    composed = [item for item in list_presets() if item.factors]
    names = {name for item in composed for name in item.factors}
    assert names <= dynamics | starts
    assert dynamics == set(list_dynamics())
    # LoRA's own start and that of LoRA-XS are what these train with anyway.
    assert set(list_initialisers()) - starts == {"kaiming", "svd"}


def test_a_run_that_diverges_never_arrives():
    curve = train(vl.parse("full"), 1e30, Problem(1), steps=20)
    assert curve.steps_to(0.05) is None
    assert curve.losses[-1] == math.inf


def test_steps_to_a_loss_are_counted_from_one():
    curve = Curve([0.5, 0.04, 0.06, 0.01], 1)
    assert [curve.steps_to(item) for item in (0.6, 0.05, 0.01)] == [1, 2, None]


def test_a_climb_ends_at_the_top_and_asks_once():
    asked = []

    def score(step):
        asked.append(step)
        return -abs(step - 3)

    best, found = climb(score, 0, 9)
    assert best == 3
    assert sorted(asked) == sorted(found) == [-1, 0, 1, 2, 3, 4]
    assert climb(score, 0, 3)[0] == 1


def test_a_run_writes_a_line_per_product_and_continues(tmp_path, capsys):
    file = tmp_path / "planted.jsonl"
    threads = torch.get_num_threads()
    try:
        main(["--methods", "lora", "pissa", "--steps", "2", "--json", str(file)])
        main(["--methods", "lora", "pissa", "--steps", "2", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["lora", "pissa"]
    assert all(line["steps_to"] == {"0.05": [None] * 3, "0.01": [None] * 3} for line in lines)
    assert lines[0]["parameters"] == 4 * 96 * 4
    assert "0 methods measured, 2 were there" in capsys.readouterr().out
    assert STEPS > 2


def test_an_unknown_product_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        main(["--methods", "lroa", "--json", str(tmp_path / "x.jsonl")])
    assert not list(tmp_path.iterdir())
