"""Two processes train what one process trains."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pair import run_pair
from tests.training.toy_training import toy_fit, toy_model
from visionlora.training import RunDirectory

SCRIPT = Path(__file__).with_name("toy_training.py")


def numbers(text):
    return np.frombuffer(bytes.fromhex(text), dtype=np.float64)


def test_two_processes_equal_one_on_the_whole_batch_and_resume_exactly(tmp_path):
    run_pair(str(SCRIPT), "distributed", str(tmp_path))
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
