"""The command behind the table of methods: its lines, continuing, what it knows of each method."""

import json
from pathlib import Path

import pytest

import visionlora as vl
from benchmarks.methods import main
from tasks.fewshot.config import RATES
from visionlora.errors import ConfigError

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
    main([*arguments, "--methods", "lora"])
    assert "0 methods measured, 1 were there" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 1


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        main(["--methods", "lroa", "--json", str(tmp_path / "x.jsonl")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [RATES, ROOT / "benchmarks" / "claims.json"], ids=lambda p: p.name)
def test_every_registered_method_has_its_entry(path):
    assert sorted(json.loads(path.read_text(encoding="utf-8"))) == vl.list_methods()
