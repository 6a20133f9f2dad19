"""The command behind the table of methods: its lines, continuing, what it knows of each method."""

import json
from pathlib import Path

import pytest

import visionlora as vl
from benchmarks.methods import main, preset_names
from tasks.fewshot.recipe import RATES
from visionlora.errors import ConfigError
from visionlora.registry import list_presets

ROOT = Path(__file__).parents[2]


def test_a_run_writes_a_line_per_method_and_continues_where_it_was(tmp_path, capsys):
    file = tmp_path / "methods.jsonl"
    arguments = ["--seed", "1", "--steps", "2", "--json", str(file)]
    main([*arguments, "--methods", "lora"])
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["method"] == "lora"
    assert line["steps"] == 2
    assert line["parameters"] == 4_608  # q, k, v of six blocks of width 64 at rank 2
    assert line["parameters"] * 4 < line["file_bytes"] < line["parameters"] * 4 + 64 * 1024
    assert 0 < line["accuracy"] <= 100
    assert list(line["losses"][0]) == ["2"]
    main([*arguments, "--methods", "lora"])
    assert "0 methods measured, 1 were there" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 1


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        main(["--methods", "lroa", "--json", str(tmp_path / "x.jsonl")])
    assert not list(tmp_path.iterdir())


def test_every_registered_method_has_its_entry():
    claims = json.loads((ROOT / "benchmarks" / "claims.json").read_text(encoding="utf-8"))
    assert sorted(claims) == vl.list_methods()
    rates = json.loads(RATES.read_text(encoding="utf-8"))
    assert set(vl.list_methods()) <= set(rates)
    products = set(rates) - set(vl.list_methods())
    assert products <= set(preset_names())


def test_presets_are_measured_beside_what_they_are_made_of():
    recipes = [vl.parse(name) for name in preset_names()]
    alone = {item.method for item in recipes if not item.init and not item.dynamics}
    assert {item.method for item in recipes} == alone
    composed = {item.name for item in list_presets() if item.factors}
    assert composed < set(preset_names())
    # Some ask for no dropout, which the recipe of the task has for LoRA.
    assert any(item.implied.get("dropout") == 0.0 for item in recipes)
    assert "lora(dropout=0.0)" in preset_names()
