"""Two processes train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.toy_training import toy_fit, toy_model
from visionlora.training import RunDirectory

SCRIPT = Path(__file__).with_name("toy_training.py")
ROOT = SCRIPT.parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, world=2):
    """Start the processes as a launcher does, through their environment."""
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    command = [sys.executable, str(SCRIPT), "distributed", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def numbers(text):
    return np.frombuffer(bytes.fromhex(text), dtype=np.float64)


def test_two_processes_equal_one_on_the_whole_batch_and_resume_exactly(tmp_path):
    launch(tmp_path)
    ranks = [json.loads((tmp_path / f"final-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["resumed_from"] == 4
    assert ranks[0]["resumed"] == ranks[0]["whole"]
    assert len((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()) == 4
    names = {path.name for path in (tmp_path / "whole/checkpoints/step-00000012").iterdir()}
    assert names == {
        "manifest.json",
        "state.safetensors",
        "rank-0.safetensors",
        "rank-1.safetensors",
    }

    alone = toy_model(dropout=0.0, norm=False)
    result = toy_fit(alone, RunDirectory(tmp_path / "alone"))
    assert ranks[0]["loss"] == pytest.approx(result.loss, rel=1e-5)
    for name, value in alone.state_dict().items():
        np.testing.assert_allclose(
            numbers(ranks[0]["whole"][name]), value.double().numpy().ravel(), rtol=1e-4, atol=1e-5
        )
