"""A run that is killed in the middle of a step, twice, ends as if it had not been."""

import os
import subprocess
import sys

import pytest
import torch

from tests.composition import runs
from tests.composition.runs import CASES, KILLED_IN, assert_same, resumable
from tests.pair import ROOT
from tests.training.test_resume import log_lines


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """Leave what killed processes leave, for all cases."""
    folder = tmp_path_factory.mktemp("killed")
    # Without devices torch needs no threads for the backward, and may be forked after one.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, runs.__file__, "killed", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_bit_identically(case, dead, tmp_path):
    whole = resumable(case, tmp_path)
    torch.default_generator.manual_seed(99)  # what a new process happens to draw must not matter
    again = resumable(case, dead / case, resume=True)
    assert again.resumed_from == KILLED_IN[-1] - 1
    assert_same(again.left(), whole.left())
    assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert again.loss == whole.loss
    assert log_lines(dead / case) == log_lines(tmp_path)
