"""The command line: a run and a prediction end to end, and user errors in one line."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "fewshot.py"
CLOTHING = ROOT.parent / "shared" / "data" / "images" / "clothing10"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *words]


def script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script in its own process, inside `folder`."""
    return subprocess.run(
        command(*words), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd):
    """Return a function that runs the script in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", command(*words)[1:])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return caught.value.code, *capfd.readouterr()

    return run


def test_a_typo_names_the_nearest_option(tmp_path):
    done = script(tmp_path, "--shot", "4")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "did you mean '--shots'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "folder:data"], "holds no images"),
        (["--method", "block-lore"], "did you mean 'block-lora'"),
        (["--adapter.rnak", "4"], "did you mean 'rank'"),
        (["--setting", "base2new"], "did you mean 'base-to-new'"),
        (["--output", "file/run"], "file"),
        (["predict", "--adapter", "data", "--images", "data"], "no pictures in data"),
        (["predict", "--adapter", "data", "--image", "data"], "did you mean '--images'"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(run_here, tmp_path, words, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("no folder")
    code, _, stderr = run_here(*words)
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert message in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


@pytest.mark.data
@pytest.mark.skipif(not CLOTHING.is_dir(), reason="the photographs of clothing10 are not here")
def test_photographs_train_evaluate_save_and_predict(run_here, tmp_path):
    words = f"--dataset folder:{CLOTHING} --shots 2 --limit-steps 5 --limit-test 60 --output run"
    code, stdout, stderr = run_here(*words.split())
    assert code == 0, stderr
    assert "zero-shot" in stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["classes"], result["test_images"], result["skipped_images"]) == (10, 60, 0)
    pictures = CLOTHING / "test" / "hat"
    code, _, stderr = run_here(
        "predict", "--adapter", "run", "--images", str(pictures), "--output", "out"
    )
    assert code == 0, stderr
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list(pictures.iterdir()))


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_result(tmp_path):
    words = ["--limit-steps", "60", "--limit-test", "100", "--checkpoint-every", "10"]
    assert script(tmp_path, *words, "--output", "whole").returncode == 0
    process = subprocess.Popen(command(*words, "--output", "cut"), cwd=tmp_path, env=ENVIRONMENT)
    store = tmp_path / "cut" / "seed_1" / "checkpoints"
    while not list(store.glob("step-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    assert script(tmp_path, *words, "--output", "cut", "--resume").returncode == 0
    whole, cut = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")
    )
    assert whole["accuracy"] == cut["accuracy"]
    adapters = [
        (tmp_path / name / "seed_1" / "adapter.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_the_default_run_keeps_its_promises(tmp_path):
    began = time.monotonic()
    assert script(tmp_path, "--output", "run").returncode == 0
    assert time.monotonic() - began < 180
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["zero_shot"] >= 50
    assert result["accuracy"] >= result["zero_shot"] + 12
