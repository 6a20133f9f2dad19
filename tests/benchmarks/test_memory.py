"""The memory benchmark shows that what LISA and SpIEL promise is so, and refuses bad input."""

import json

import pytest
import torch

from benchmarks.memory import main
from visionlora.training.cli import run_cli

pytest.importorskip("peft")
pytest.importorskip("timm")

SETTING = ["--model", "vit_tiny_patch16_224", "--depth", "2", "--steps", "10"]


def test_state_falls_where_a_part_trains_and_grows_where_it_is_kept(tmp_path, capsys):
    file = tmp_path / "memory.jsonl"
    products = {
        "full": "full",
        "lisa": "lisa(gamma=1,every=2)",
        "kept": "lisa(gamma=1,every=2,state=kept)",
        "hft": "hft",
        "spiel": "spiel(density=0.01,every=4,observe=2)",
        "sm3": "spiel(density=0.01,every=4,observe=2,selection=sm3)",
    }
    threads = str(torch.get_num_threads())  # the command sets it for the whole process
    main([*SETTING, "--threads", threads, "--products", *products.values(), "--json", str(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["product"] for line in lines] == list(products.values())
    rows = dict(zip(products, lines, strict=True))
    full, counters = rows["full"], 16 * 1024  # of steps, and the generator of the draws
    assert full["state"] == pytest.approx(2 * full["trained"], abs=counters)
    assert full["gradients"] == full["trained"]
    assert rows["lisa"]["trained"] == full["trained"]
    assert rows["lisa"]["state"] == pytest.approx(full["state"] / 2, abs=counters)
    assert rows["lisa"]["gradients"] == full["gradients"] / 2
    assert rows["lisa"]["saved"] < full["saved"]
    assert rows["kept"]["state"] == pytest.approx(full["state"], abs=counters)
    assert rows["hft"]["state"] < 0.85 * full["state"]  # q, k and v are one matrix here
    assert rows["spiel"]["trained"] == pytest.approx(0.01 * full["trained"], rel=1e-3)
    assert rows["spiel"]["state"] < 0.05 * full["state"]
    assert rows["sm3"]["state"] < 0.2 * rows["spiel"]["state"]
    # A value and its position: 8 bytes, and the description of the sites.
    assert rows["spiel"]["file"] == pytest.approx(2 * rows["spiel"]["trained"], abs=counters)
    table = capsys.readouterr().out
    assert "trained" in table
    assert "of full" in table


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--json", "/no/such/folder/x.jsonl"], "its folder does not exist"),
        (["--products", "lysa"], "lysa"),
        (["--products", "full", "spiel(count=99999999)"], "99999999 entries are more than"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_cli(lambda: main([*SETTING, *arguments]))
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.err.startswith("error: ")
    assert reason in output.err
    assert output.err.count("\n") == 1
