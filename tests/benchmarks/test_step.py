"""The step benchmark runs, writes what it promises, and refuses bad input in one line."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.step import bench_extra, main
from visionlora.errors import ConfigError
from visionlora.training.cli import run_cli

pytest.importorskip("peft")
pytest.importorskip("timm")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"
TINY = ["--model", "vit_tiny_patch16_224", "--depth", "1", "--batch", "1", "--repeats", "1"]
KEYS = {"library", "method", "model", "rank", "batch"} | {
    f"{ratio}_ratio" for ratio in ("step", "forward", "saved")
}


def test_lines_have_the_promised_keys_and_ours_saves_no_more_than_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.jsonl"
    threads = str(torch.get_num_threads())  # the command sets it for the whole process
    main([*TINY, "--methods", "lora", "lora-fa", "--threads", threads, "--json", str(file)])
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.keys() >= KEYS for line in lines)
    rows = {(line["library"], line["method"]): line for line in lines}
    assert list(rows) == [
        ("torch", "floor"),
        ("torch", "full"),
        ("peft", "lora"),
        ("visionlora", "lora"),
        ("visionlora", "lora-fa"),  # PEFT has no such layer
    ]
    assert rows["torch", "floor"]["step_ratio"] == rows["torch", "floor"]["saved_ratio"] == 1
    saved = {key: row["saved_ratio"] for key, row in rows.items()}
    assert saved["visionlora", "lora"] <= saved["peft", "lora"] < saved["torch", "full"]
    assert saved["visionlora", "lora-fa"] < 1  # no input of an adapted layer is kept
    assert all(name in table for name in ("floor", "peft", "visionlora", "lora-fa"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--methods", "lora", "--json", "/no/such/folder/x.jsonl"], "its folder does not exist"),
        (["--methods", "block-lora", "--rank", "3"], "blocks must divide the rank"),
        (["--methods", "lora", "--rank", "500"], "at most 192"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_measuring(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_cli(lambda: main([*TINY, *arguments]))
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.err.startswith("error: ")
    assert reason in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_an_unknown_method_ends_the_command_with_one_line_and_exit_code_2() -> None:
    command = [sys.executable, str(SCRIPT), "--methods", "lroa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "unknown method 'lroa' (did you mean 'lora'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_missing_package_names_the_extra_to_install() -> None:
    said = r"need no_such_package: pip install .*\[bench\]"
    with pytest.raises(ConfigError, match=said), bench_extra():
        importlib.import_module("no_such_package")
