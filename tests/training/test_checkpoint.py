"""Checkpoints are complete or absent, and damage is seen."""

import json

import numpy as np
import pytest
import torch

from visionlora.errors import OutputError
from visionlora.training.checkpoint import CheckpointStore
from visionlora.training.tree import read_tree, write_tree


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        store.save(step, {"step": step, "w": torch.arange(50.0)}, {"rng": step}, keep=3)
    return store


def same_tree(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_tree(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        same = type(left) is type(right) and len(left) == len(right)
        return same and all(map(same_tree, left, right))
    return type(left) is type(right) and left == right


def test_tree_round_trip_is_exact(tmp_path):
    shared = torch.arange(6.0)
    tree = {
        "none": None,
        "numbers": [1, 0.1, -1e-300, float("inf"), True, "text"],
        "tuple": (1, (2.5, None)),
        "int keys": {0: {"exp_avg": shared[:3], "step": torch.tensor(3.0)}, 7: {}},
        "views": [shared, shared.view(2, 3).T],
        "dtypes": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int8, torch.bool)],
        "marked": {"$tensor": "not a tensor"},
        "empty": [{}, [], (), torch.empty(0, 4)],
    }
    write_tree(tmp_path / "tree.safetensors", tree)
    assert same_tree(read_tree(tmp_path / "tree.safetensors"), tree)


def test_numpy_random_state_survives(tmp_path):
    state = np.random.RandomState(4).get_state(legacy=True)
    write_tree(tmp_path / "tree.safetensors", {"numpy": state})
    name, keys, *rest = read_tree(tmp_path / "tree.safetensors")["numpy"]
    assert (name, *rest) == (state[0], *state[2:])
    assert np.array_equal(keys.numpy(), state[1])


def test_unknown_objects_are_refused_rather_than_pickled(tmp_path):
    with pytest.raises(TypeError, match="cannot store a set"):
        write_tree(tmp_path / "tree.safetensors", {"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_newest_is_found_and_read(store):
    checkpoint = store.newest()
    assert (checkpoint.step, checkpoint.processes) == (3, 1)
    assert checkpoint.shared()["step"] == 3
    assert checkpoint.own(0) == {"rng": 3}


def damage_truncate(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(folder):
    file = folder / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def damage_lose_rank(folder):
    (folder / "rank-0.safetensors").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_foreign_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps([1]))


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_flip, damage_lose_rank, damage_manifest, damage_foreign_manifest],
)
def test_damage_is_reported_and_the_previous_one_used(store, damage, caplog):
    damage(store.path / "step-00000003")
    assert store.newest().step == 2
    assert "step-00000003 is damaged" in caplog.text


def test_no_usable_checkpoint_is_none(store, tmp_path):
    for step in (1, 2, 3):
        damage_manifest(store.path / f"step-0000000{step}")
    assert store.newest() is None
    assert CheckpointStore(tmp_path / "nowhere").newest() is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(store):
    damage_truncate(store.path / "step-00000003")
    store.save(3, {"step": 3}, {}, keep=3)
    assert store.newest().step == 3


def test_half_written_folders_are_invisible_and_removed(store):
    partial = store.path / ".step-00000009.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    assert store.newest().step == 3
    store.remove_partial()
    assert not partial.exists()


def test_pruning_keeps_the_newest(store):
    store.save(4, {}, {}, keep=2)
    assert sorted(path.name for path in store.path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {}, {}, keep=1)
