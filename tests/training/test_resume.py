"""A resumed run is the uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.toy_training import Wobble, exact, toy_batches, toy_fit, toy_model
from visionlora.errors import ConfigError
from visionlora.training import RunDirectory

SCRIPT = Path(__file__).with_name("toy_training.py")
ROOT = SCRIPT.parents[2]


def slow_run(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "slow", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def log_lines(folder):
    """Return the log without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def whole(tmp_path):
    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path / "whole"))
    return exact(model), result


def stopped(folder, after, **settings):
    """Run until the data of step `after` is asked for, and die there."""
    source = toy_batches()

    def batches(index):
        if index == 2 * after:
            raise OSError("power cut")
        return source(index)

    with pytest.raises(OSError, match="power cut"):
        toy_fit(toy_model(), RunDirectory(folder), batches=batches, **settings)


def test_run_killed_in_the_middle_resumes_bit_identically(tmp_path, whole):
    killed = tmp_path / "killed"
    process = slow_run(killed)
    wait_for(killed / "at-10", process)  # the checkpoint of step 8 exists, steps 8 and 9 are lost
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "checkpoints" / "step-00000012").exists()
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')  # as if it died while it wrote
    model = toy_model()
    result = toy_fit(model, RunDirectory(killed, resume=True))
    assert whole[1].resumed_from is None
    assert result.resumed_from == 8
    assert (exact(model), result.loss) == (whole[0], whole[1].loss)
    assert log_lines(killed) == log_lines(tmp_path / "whole")
    assert [line["step"] for line in log_lines(killed)] == [3, 6, 9, 12]


def test_resume_from_every_checkpoint_gives_the_same_run(tmp_path, whole):
    for after in (4, 5, 11):
        folder = tmp_path / f"run-{after}"
        stopped(folder, after, checkpoint_every=1)
        torch.manual_seed(99)  # what the new process happens to have drawn must not matter
        model = toy_model()
        result = toy_fit(model, RunDirectory(folder, resume=True), checkpoint_every=1)
        assert result.resumed_from == after
        assert (exact(model), result.loss) == (whole[0], whole[1].loss)
        assert log_lines(folder) == log_lines(tmp_path / "whole")


def test_truncated_checkpoint_is_reported_and_the_previous_one_used(tmp_path, whole, caplog):
    stopped(tmp_path / "run", 10)
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path / "run", resume=True))
    assert result.resumed_from == 4
    assert exact(model) == whole[0]
    assert "step-00000008 is damaged" in caplog.text


def test_resuming_a_finished_run_changes_nothing(tmp_path, whole):
    before = log_lines(tmp_path / "whole")
    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path / "whole", resume=True))
    assert result.resumed_from == result.steps == 12
    assert (exact(model), result.loss) == (whole[0], whole[1].loss)
    assert log_lines(tmp_path / "whole") == before


def test_resume_without_a_checkpoint_starts_over(tmp_path, whole):
    stopped(tmp_path / "run", 4, checkpoint_every=0)
    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path / "run", resume=True))
    assert result.resumed_from is None
    assert exact(model) == whole[0]
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def test_ctrl_c_finishes_the_step_saves_and_stops(tmp_path, whole):
    source = toy_batches()

    def batches(index):
        if index == 11:  # the second micro-batch of step 5
            signal.raise_signal(signal.SIGINT)
        return source(index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_model(), RunDirectory(tmp_path / "run"), batches=batches, checkpoint_every=0)
    assert signal.getsignal(signal.SIGINT) is before
    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path / "run", resume=True), checkpoint_every=0)
    assert result.resumed_from == 6
    assert exact(model) == whole[0]


def test_second_ctrl_c_stops_at_once(tmp_path):
    def batches(index):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_model(), RunDirectory(tmp_path / "run"), batches=batches)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_with_other_settings_names_them(tmp_path):
    stopped(tmp_path / "run", 6)
    run = RunDirectory(tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"accumulate was 2 and is 4; .*seed was 0 and is 1"):
        toy_fit(toy_model(), run, accumulate=4, seed=1)


def test_resume_with_another_model_or_dynamics_is_refused_and_touches_nothing(tmp_path):
    stopped(tmp_path / "run", 6)
    run = RunDirectory(tmp_path / "run", resume=True)
    other = toy_model()
    other[0] = torch.nn.Linear(6, 12, bias=False)
    before = exact(other)
    with pytest.raises(ConfigError, match=r"unknown 0\.bias: it is of another model"):
        toy_fit(other, run)
    assert exact(other) == before
    with pytest.raises(ConfigError, match="dynamics"):
        toy_fit(toy_model(), run, dynamics=[])
    with pytest.raises(ConfigError, match="dynamics"):
        toy_fit(toy_model(), run, dynamics=[Wobble(), type("Other", (Wobble,), {"name": "o"})()])


def test_checkpoint_holds_what_was_trained_and_not_the_frozen_rest(tmp_path):
    toy_fit(toy_model(), RunDirectory(tmp_path / "run"))
    checkpoint = RunDirectory(tmp_path / "run", resume=True).checkpoints.newest()
    trained = checkpoint.shared()["trained"]
    assert set(trained["parameters"]) == {
        f"{layer}.{name}" for layer in (0, 1, 4) for name in ("weight", "bias")
    }
    assert set(trained["buffers"]) == {
        f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
