"""A run that dies in any phase of rank allocation resumes as if it had not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visionlora as vl
from tests.ranks.cases import METHODS, STEPS
from tests.ranks.planted import Problem
from tests.training.test_resume import log_lines, wait_for
from tests.training.toy_training import exact
from visionlora.errors import ConfigError
from visionlora.training import RunDirectory

SETTINGS = {"steps": STEPS, "checkpoint_every": 1, "log_every": 4, "clip_norm": 1.0}
ROOT = Path(__file__).parents[2]


def problem():
    return Problem(noise=0.2, examples=24)


def fresh(case):
    method, options = METHODS[case]
    return problem().model(method, **options)


def run(case, folder, model=None, **settings):
    model = fresh(case) if model is None else model
    result = problem().fit(model, folder, **{**SETTINGS, **settings})
    return model, result


def dying(case, folder, after):
    """Train until the data of a step are asked for, and die there."""

    def batches(step):
        if step == after:
            raise OSError("power cut")
        return problem().batches(step)

    with pytest.raises(OSError, match="power cut"):
        run(case, folder, batches=batches)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, result = run(request.param, folder)
    return request.param, folder, exact(model), result, vl.adapter_state_dict(model)


@pytest.mark.parametrize("after", [4, 9, 12, 23])
def test_a_run_that_died_resumes_bit_identically(whole, after, tmp_path):
    case, folder, expected, result, adapter = whole
    dying(case, tmp_path, after)
    torch.manual_seed(99)
    model, again = run(case, tmp_path, resume=True)
    assert again.resumed_from == after
    assert (exact(model), again.loss) == (expected, result.loss)
    assert list(vl.adapter_state_dict(model)) == list(adapter)
    assert log_lines(tmp_path) == log_lines(folder)


def test_resuming_a_finished_run_changes_nothing(whole):
    case, folder, expected, result, _ = whole
    model, again = run(case, folder, resume=True)
    assert (again.resumed_from, again.loss) == (STEPS, result.loss)
    assert exact(model) == expected


def test_the_result_is_saved_as_it_is(whole, tmp_path):
    case, folder, *_ = whole
    model, _ = run(case, folder, resume=True)
    inputs = problem().inputs
    output = model(inputs)
    loaded = vl.load(problem().base, vl.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(loaded(inputs), output)
    with vl.merged(model):
        torch.testing.assert_close(model(inputs), output, rtol=1e-10, atol=1e-10)


def test_other_options_are_refused_and_nothing_is_touched(tmp_path):
    dying("adalora", tmp_path, 8)
    model = problem().model("adalora", rank=3, target=1.5, interval=4)
    before = exact(model)
    with pytest.raises(ConfigError, match="interval was 3 and is 4; resume with the options"):
        run("adalora", tmp_path, model, resume=True)
    part = vl.inject(problem().base, "adalora", "blocks.0.a", rank=3, target=1.5, interval=3)
    with pytest.raises(ConfigError, match="it is of another model"):
        run("adalora", tmp_path, part, resume=True)
    assert exact(model) == before


@pytest.mark.parametrize("case", ["increlora", pytest.param("diffora", marks=pytest.mark.slow)])
def test_a_killed_process_resumes_bit_identically(case, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, case, str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "killed" / "at-13", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole, result = run(case, tmp_path / "whole")
    model, again = run(case, tmp_path / "killed", resume=True)
    assert 12 <= again.resumed_from < STEPS
    assert (exact(model), again.loss) == (exact(whole), result.loss)


def slowly(case, folder):
    """Train, mark where it is, and wait at one step for what comes."""

    def batches(step):
        (Path(folder) / f"at-{step}").touch()
        if step == 14:
            signal.pause()
        return problem().batches(step)

    RunDirectory(folder)
    run(case, folder, batches=batches)


if __name__ == "__main__":
    torch.set_num_threads(1)
    slowly(sys.argv[1], sys.argv[2])
