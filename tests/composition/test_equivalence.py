"""Accumulated micro-batches and bf16 autocast give the run of whole batches in full precision."""

import json

import pytest
import torch

from tests.composition.runs import CASES, WHOLE, assert_same, network, outputs, told, train
from tests.tolerances import TOLERANCES


def losses(run):
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def tensors(tree):
    """Return all tensors of a nested state."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [item for part in parts for item in tensors(part)]


@pytest.mark.parametrize("case", CASES)
def test_accumulated_micro_batches_equal_the_whole_batch(case, plain, tmp_path):
    whole, parts = plain(case), train(case, tmp_path, parts=3, options=WHOLE)
    assert_same(told(parts), told(whole), factor=1.0)
    assert_same(parts.left(), whole.left(), factor=1.0)
    assert_same(dict(parts.model.state_dict()), dict(whole.model.state_dict()), factor=1.0)


@pytest.mark.parametrize("case", CASES)
def test_bf16_autocast_stays_beside_full_precision(case, tmp_path):
    full = train(case, tmp_path / "full", dtype=torch.float32)
    half = train(case, tmp_path / "half", dtype=torch.float32, precision="bf16")
    assert half.loss != full.loss
    assert ((losses(half) - losses(full)).abs() <= TOLERANCES[torch.bfloat16] * losses(full)).all()
    # Adam's steps hardly depend on the size of a gradient, so an error in a small one shows in the
    # parameters, which nobody sees, but not in what the training has changed.
    changed = full.outputs() - outputs(network())
    assert (half.outputs() - full.outputs()).norm() < 0.05 * changed.norm()
    floating = [item for item in tensors(half.left()["trained"]) if item.is_floating_point()]
    assert {item.dtype for item in floating} == {torch.float32}
    assert all(item.isfinite().all() for item in floating)
