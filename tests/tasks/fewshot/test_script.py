"""The command line: a run and a prediction end to end, and user errors in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLOTHING = ROOT.parent / "shared" / "data" / "images" / "clothing10"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "fewshot.py"), *words]


def script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script inside `folder`."""
    return subprocess.run(
        command(*words), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Check for exit code 2 and one line on stderr that holds `parts`."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in parts)


def test_a_typo_names_the_nearest_option(tmp_path):
    refused(script(tmp_path, "--shot", "4"), "--shot", "did you mean '--shots'")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    refused(script(tmp_path, "--dataset", "folder:data"), "holds no images")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.data
@pytest.mark.skipif(not CLOTHING.is_dir(), reason="the photographs of clothing10 are not here")
def test_photographs_train_evaluate_save_and_predict(tmp_path):
    words = f"--dataset folder:{CLOTHING} --shots 2 --limit-steps 5 --limit-test 60 --output run"
    done = script(tmp_path, *words.split())
    assert done.returncode == 0, done.stderr
    assert "zero-shot" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["classes"], result["test_images"], result["skipped_images"]) == (10, 60, 0)
    pictures = str(CLOTHING / "test" / "hat")
    done = script(tmp_path, "predict", "--adapter", "run", "--images", pictures, "--output", "out")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list((CLOTHING / "test" / "hat").iterdir()))


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
