"""The table of dynamics runs, covers the registry, and writes what it promises."""

import json
import math
from pathlib import Path

import pytest
import torch

import visionlora as vl
from visionlora.registry import list_dynamics
from visionlora.training.cli import run_cli

pytest.importorskip("peft")
pytest.importorskip("timm")

from benchmarks.dynamics import main
from benchmarks.products import GOALS, default_products
from benchmarks.turns import in_turns

TINY = ["--model", "vit_tiny_patch16_224", "--batch", "1", "--repeats", "1"]
KEYS = {"product", "beside", "model", "rank", "batch", "step_ratio", "goal"} | {
    "state_bytes",
    "beside_state_bytes",
}


def test_every_dynamics_is_measured_and_every_goal_is_one_of_them() -> None:
    recipes = [vl.parse(text) for text in default_products()]
    measured = {item.name for recipe in recipes for item in recipe.dynamics}
    assert measured == set(list_dynamics())
    assert set(GOALS) <= measured
    assert any(recipe.init is not None and recipe.init.residual for recipe in recipes)
    assert any(vl.get_method(recipe.method).config.form == "sparse" for recipe in recipes)


def test_lines_have_the_promised_keys_and_the_exact_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dynamics.jsonl"
    products = ["lora", "allora", "sam", "lora-pro", "pissa", "lisa(gamma=1)", "lora-ga"]
    threads = str(torch.get_num_threads())  # the command sets it for the whole process
    main([*TINY, "--threads", threads, "--json", str(file), "--products", *products])
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.keys() >= KEYS for line in lines)
    rows = {line["product"]: line for line in lines}
    assert list(rows) == products
    assert all(math.isfinite(line["step_ratio"]) and line["step_ratio"] > 0 for line in lines)
    assert [line["beside"] for line in lines] == ["lora"] * 5 + ["full", "lora"]
    assert {name: line["goal"] for name, line in rows.items() if line["goal"]} == {"sam": 2.1}
    # Two blocks of width 192: AdamW keeps two float32 numbers per trained one, and a step count.
    shapes = [(576, 192), (192, 192), (768, 192), (192, 768)]
    weights, pairs = (sum(out * in_ for out, in_ in shapes), sum(map(sum, shapes)) * 8)
    lora = 2 * (2 * 4 * pairs + len(shapes) * 2 * 4)
    for name in ("lora", "allora", "sam", "pissa", "lora-ga"):
        assert rows[name]["state_bytes"] == rows[name]["beside_state_bytes"] == lora
    assert rows["lora-pro"]["state_bytes"] == 2 * 2 * 4 * weights
    full = rows["lisa(gamma=1)"]["beside_state_bytes"]
    assert full == 2 * (2 * 4 * weights + len(shapes) * 4)
    generator = torch.Generator().get_state().numel()  # of the draws
    assert rows["lisa(gamma=1)"]["state_bytes"] == full / 2 + generator
    assert all(name in table for name in ("lora-pro", "lisa", "state MB"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--products", "lora+glda"], "'glda' is neither an initialiser nor a dynamics"),
        (["--products", "lora+glad+sam"], "leave one out"),
        (["--products", "glad", "--rank", "500"], "at most 192"),
        (["--products", "glad", "--json", "/no/such/folder/x.jsonl"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_measuring(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_cli(lambda: main([*TINY, *arguments]))
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.err.startswith("error: ")
    assert reason in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_turns_rotate_and_end_with_the_deadline() -> None:
    order: list[str] = []

    def turn(name: str) -> int:
        order.append(name)
        return len(order)

    group = [lambda: turn("a"), lambda: turn("b"), lambda: turn("c")]
    assert in_turns(group, 2, math.inf) == [[1, 6], [2, 4], [3, 5]]
    assert "".join(order) == "abcbca"
    assert in_turns(group, 5, -math.inf) == [[7], [8], [9]]
