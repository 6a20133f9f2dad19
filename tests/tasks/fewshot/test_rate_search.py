"""`--lr auto`: fair, repeatable, searched once, and without a look at the test images."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import visionlora as vl
from tasks.fewshot import rate_search, train
from tasks.fewshot.adapt import adapt
from tasks.fewshot.config import AUTO, FewshotConfig
from tasks.fewshot.evaluate import TestImages
from tasks.fewshot.experiment import prepare
from tasks.fewshot.rate_search import HELD_OUT, OWN, grid, search, validation_split
from tasks.fewshot.rate_trial import Rungs
from visionlora.errors import ConfigError, DataError, DivergedError
from visionlora.training import RunDirectory
from visionlora.training.cli import parse


def quick(**options) -> FewshotConfig:
    """A search of a few trials of nine steps."""
    base = {"lr": AUTO, "lr_trials": 4, "lr_steps": 9, "limit_steps": 9, "limit_test": 20}
    return FewshotConfig(**{**base, "shots": 4, "batch_size": 8, "checkpoint_every": 0, **options})


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_grid_starts_in_the_middle_and_is_even_in_the_logarithm(count):
    rates = grid(2e-3, count)
    assert (rates[0], len(set(rates))) == (2e-3, count)
    steps = [math.log(b / a) for a, b in zip(sorted(rates), sorted(rates)[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=0.01) if steps else True
    if count == 9:
        assert (min(rates), max(rates)) == pytest.approx((2e-4, 2e-2))


def test_without_validation_images_shots_are_held_out():
    experiment = prepare(quick(shots=6))
    shots = experiment.shots(1)
    train_shots, held, source = validation_split(experiment, shots)
    assert source == HELD_OUT
    kept = {id(item) for item in train_shots.items}
    assert kept.isdisjoint(id(item) for item in held)
    assert kept | {id(item) for item in held} == {id(item) for item in shots.items}
    assert torch.bincount(torch.tensor([item.label for item in held])).tolist() == [3] * 10
    assert torch.bincount(train_shots.labels).tolist() == [3] * 10
    assert [item.label for item in train_shots.items] == train_shots.labels.tolist()


def test_own_validation_images_are_those_of_the_trained_classes():
    experiment = prepare(quick(setting="base-to-new"))
    data = experiment.dataset
    experiment.dataset = replace(data, train=data.train[:500], val=data.train[500:])
    shots = experiment.shots(1)
    train_shots, held, source = validation_split(experiment, shots)
    assert (train_shots, source) == (shots, OWN)
    assert torch.bincount(torch.tensor([item.label for item in held])).tolist() == [4] * 5
    own = {id(item) for item in experiment.dataset.val}
    assert all(id(item) in own for item in held)


def test_a_repeated_image_is_never_on_both_sides():
    experiment = prepare(quick(shots=6, short_class="repeat"))
    data = experiment.dataset
    experiment.dataset = replace(data, train=data.train[:40])
    train_shots, held, _ = validation_split(experiment, experiment.shots(1))
    assert len(train_shots.items) > len({id(item) for item in train_shots.items})
    assert {id(item) for item in train_shots.items}.isdisjoint(id(item) for item in held)


def test_one_shot_leaves_nothing_to_hold_out_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match="one shot a class leaves none"):
        train.run(quick(shots=1, output=str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


def test_a_search_repeats_itself_and_leaves_the_backbone_as_it_was():
    experiment = prepare(quick(method="block-lora+glad"))
    before = {name: value.clone() for name, value in experiment.backbone.clip.state_dict().items()}
    experiment.test = None  # whoever looks at the test images fails
    first, second = (search(experiment, experiment.shots(1)) for _ in range(2))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    after = experiment.backbone.clip.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_of_the_finished_trials_is_chosen_and_the_cost_is_counted():
    experiment = prepare(quick())
    found = search(experiment, experiment.shots(1))
    finished = [trial for trial in found.trials if trial.outcome == "finished"]
    assert found.trials[0] in finished  # the recipe's own rate
    best = max(finished, key=lambda trial: (trial.accuracy, -trial.loss))
    assert found.lr == best.lr
    assert all((trial.steps == 9) == (trial.outcome == "finished") for trial in found.trials)
    assert {trial.steps for trial in found.trials} <= {1, 3, 9}
    assert found.steps == sum(trial.steps for trial in found.trials) < 4 * 9
    assert rate_search.RateSearch.from_dict(found.to_dict()) == found
    assert found.images == 20


def test_rates_that_diverge_are_said_so(monkeypatch):
    monkeypatch.setattr(rate_search, "middle", lambda config: 1e30)
    experiment = prepare(quick(lr_trials=2))
    shots = experiment.shots(1)
    with pytest.raises(DivergedError, match="no learning rate"):
        search(experiment, shots)


def test_a_resumed_run_does_not_search_again(tmp_path, monkeypatch, capsys):
    config = quick(output=str(tmp_path / "run"))
    first = train.run(config)
    printed = capsys.readouterr().out
    found = first["lr_search"]
    assert "searching the learning rate: 4 trials of up to 9 steps" in printed
    assert f"lr {found['lr']:g}, chosen on 20 {HELD_OUT}" in printed
    assert f"4 trials, {found['steps']} steps" in printed
    assert (first["lr"], first["config"]["lr"]) == (found["lr"], AUTO)
    assert found == json.loads((tmp_path / "run" / "lr_search.json").read_text())

    def never(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr(rate_search, "search", never)
    more = train.run(replace(config, seed=[1, 2], resume=True))
    assert more["lr_search"] == found
    assert more["per_seed"][0] == first["per_seed"][0]
    assert more["wall_seconds"] > found["seconds"]


RECIPES = ["adalora", "moe-lora", "block-lora+ggpo", "full+lisa"]


@pytest.mark.parametrize("method", RECIPES)
def test_scoring_in_the_middle_changes_nothing_of_the_training(method, tmp_path):
    class Never:
        def report(self, value: float, rung: int) -> None:
            assert math.isfinite(value)

        def should_prune(self) -> bool:
            return False

    experiment = prepare(quick(steps=4, lr=1e-3, lr_trials=None, lr_steps=None, method=method))
    shots, clip = experiment.shots(1), experiment.backbone.clip
    images = TestImages(experiment.dataset.train[:20], experiment.backbone.transform)
    adapters = []
    for dynamics in ([], [Rungs(experiment, images, Never())]):
        experiment.inject(1)
        adapt(experiment, 1, shots, RunDirectory(tmp_path / str(len(dynamics))), dynamics=dynamics)
        adapters.append(
            {name: value.clone() for name, value in vl.adapter_state_dict(clip).items()}
        )
        vl.eject(clip)
    plain, scored = adapters
    assert plain.keys() == scored.keys()
    assert all(torch.equal(plain[name], scored[name]) for name in plain)


def test_a_missing_optuna_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'visionlora\[search\]'"):
        train.run(quick(output=str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


def test_the_option_takes_a_number_or_auto():
    assert parse(FewshotConfig, ["--lr", "auto"]).lr == AUTO
    assert parse(FewshotConfig, ["--lr", "1e-3"]).lr == 1e-3
    with pytest.raises(ConfigError, match=r"--lr must be a number or auto, got 'fast'"):
        parse(FewshotConfig, ["--lr", "fast"])
    with pytest.raises(ConfigError, match="--lr-trials belongs to --lr auto"):
        FewshotConfig(lr=1e-3, lr_trials=3)
    with pytest.raises(ConfigError, match="--lr-steps must be at least 1"):
        FewshotConfig(lr=AUTO, lr_steps=0)


def test_the_longest_trial_is_a_quarter_of_the_run():
    config = FewshotConfig(lr=AUTO, steps=200).resolved(("{}",))
    assert (config.lr, config.lr_trials, config.lr_steps) == (AUTO, 9, 50)
    assert config.resolved(("{}",)) == config
    assert FewshotConfig(steps=200).resolved(("{}",)).lr_steps is None
