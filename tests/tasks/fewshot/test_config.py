"""The recipe fills what is left open, the user's options win, and nonsense is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tasks.fewshot.config import FewshotConfig
from visionlora.errors import ConfigError
from visionlora.registry import list_methods
from visionlora.training.cli import parse

CONFIGS = sorted(Path(__file__).parents[3].glob("configs/fewshot/*.yaml"))
TEMPLATES = ("a photo of a {}.",)


def test_vit_follows_clip_lora():
    config = FewshotConfig(
        backbone="ViT-B/16", setting="base-to-new", shots=4, method="lora"
    ).resolved(TEMPLATES)
    assert config.steps == 400
    config = replace(config, setting="all", steps=None).resolved(TEMPLATES)
    assert (config.lr, config.steps, config.template) == (2e-4, 2000, list(TEMPLATES))
    assert {key: config.adapter[key] for key in ("rank", "alpha", "scaling", "dropout")} == {
        "rank": 2,
        "alpha": 1.0,
        "scaling": "rslora",
        "dropout": 0.25,
    }


def test_the_users_choices_win():
    config = FewshotConfig(lr=1e-3, steps=7, limit_steps=5, template=["{}"], adapter={"rank": 4})
    resolved = config.resolved(TEMPLATES)
    assert (resolved.lr, resolved.steps, resolved.template) == (1e-3, 5, ["{}"])
    assert resolved.adapter["rank"] == 4


def test_resolving_twice_changes_nothing():
    config = FewshotConfig(limit_steps=9).resolved(TEMPLATES)
    assert config.resolved(("other {}",)) == config


def test_each_seed_gets_its_own_initial_values():
    config = FewshotConfig()
    assert [config.adapter_options(seed)["seed"] for seed in (1, 2)] == [1, 2]


@pytest.mark.parametrize("method", list_methods())
def test_every_registered_method_has_a_recipe(method):
    config = FewshotConfig(method=method).resolved(TEMPLATES)
    assert config.lr is not None
    assert config.adapter_options(3)["seed"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "--shots must be at least 1"),
        ({"limit_test": 0}, "--limit-test must be at least 1"),
        ({"lr": -1.0}, "--lr must be positive"),
        ({"seed": [1, 1]}, "different numbers"),
        ({"seed": []}, "different numbers"),
        ({"template": ["photo"]}, "once"),
        ({"method": "block-lore"}, "did you mean 'block-lora'"),
        ({"adapter": {"rnak": 2}}, "did you mean 'rank'"),
        ({"adapter": {"rank": 3}}, "blocks must divide the rank"),
        ({"text_chunk": 4, "method": "spiel"}, "once per chunk"),
        ({"text_chunk": 4, "encoder": "vision"}, "text tower that trains"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FewshotConfig(**options)


def test_flags_reach_the_fields():
    words = "--seed 1 2 3 --params q v --adapter.rank 4 --limit-steps 3 --template {} --strict"
    config = parse(FewshotConfig, words.split())
    assert (config.seed, config.params, config.template) == ([1, 2, 3], ["q", "v"], ["{}"])
    assert (config.adapter, config.limit_steps, config.strict) == ({"rank": 4}, 3, True)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_experiment_file_is_valid_and_says_how_to_run_it(file):
    parse(FewshotConfig, ["--config", str(file)])
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python scripts/fewshot.py --config configs/fewshot/{file.name}")
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_there_are_experiment_files():
    assert len(CONFIGS) >= 4
