"""The run folder: who may use it, what it says, and that nothing is lost in it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from visionlora.errors import ConfigError, OutputError
from visionlora.training import RunDirectory


@dataclass
class Inner:
    rank: int = 2
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class Config:
    output: Path = Path("somewhere")
    steps: int = 5
    inner: Inner = field(default_factory=Inner)
    resume: bool = False


def test_config_is_written_as_plain_yaml(tmp_path):
    RunDirectory(tmp_path).write_config(Config())
    expected = {
        "output": "somewhere",
        "steps": 5,
        "inner": {"rank": 2, "betas": [0.9, 0.99]},
        "resume": False,
    }
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == expected


def test_result_says_where_it_came_from(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config({"seed": 3})
    returned = run.write_result({"accuracy": 81.5, "loss": float("nan"), "wall_seconds": 1.0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == returned
    assert result["accuracy"] == 81.5
    assert result["loss"] is None
    assert result["wall_seconds"] == 1.0  # what the task measured itself is kept
    assert result["config"] == {"seed": 3}
    assert {"python", "torch", "accelerate", "safetensors"} <= set(result["versions"])
    assert result["peak_memory_mb"] > 10
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(result["git_commit"]) == 40


@pytest.mark.parametrize(
    ("name", "state"), [("result.json", "a finished run"), ("log.jsonl", "an unfinished run")]
)
def test_a_used_folder_is_refused_with_what_to_do(tmp_path, name, state):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match=rf"already holds {state}.*--resume.*--overwrite"):
        RunDirectory(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_a_folder_with_other_files_is_welcome(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config({"a": 1})
    run.log({"step": 1})
    run.write_result({})
    run.checkpoints.save(1, {}, {}, keep=1)
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="exclude"):
        RunDirectory(tmp_path, resume=True, overwrite=True)


def test_resume_names_every_changed_field(tmp_path):
    RunDirectory(tmp_path).write_config(Config())
    before = (tmp_path / "config.yaml").read_text()
    changed = Config(steps=6, inner=Inner(rank=4), resume=True, output=Path("elsewhere"))
    with pytest.raises(ConfigError, match=r"steps was 5 and is 6; inner\.rank was 2 and is 4$"):
        RunDirectory(tmp_path, resume=True).write_config(changed)
    assert (tmp_path / "config.yaml").read_text() == before
    RunDirectory(tmp_path, resume=True).write_config(Config(resume=True))


def test_parts_of_a_run_open_as_the_run_does(tmp_path):
    run = RunDirectory(tmp_path)
    run.child("seed-1").log({"step": 1})
    with pytest.raises(OutputError, match="seed-1 already holds"):
        run.child("seed-1")
    assert RunDirectory(tmp_path, resume=True).child("seed-1").resume
    RunDirectory(tmp_path, overwrite=True).child("seed-1")
    assert not (tmp_path / "seed-1" / "log.jsonl").exists()


def test_log_is_cut_to_whole_lines_up_to_a_step(tmp_path):
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.log({"step": step, "loss": 0.1})
    run.log({"note": "no step"})
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    run.truncate_log(3)
    run.log({"step": 4})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [1, 2, 3, None, 4]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make"):
        RunDirectory(tmp_path / "file" / "run")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make"):
        RunDirectory(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error_of_the_log(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"log\.jsonl: No space left on device"):
        run.log({"step": 1})


def test_later_processes_neither_claim_nor_write(tmp_path, monkeypatch):
    RunDirectory(tmp_path).write_config({"a": 1})
    monkeypatch.setenv("RANK", "1")
    run = RunDirectory(tmp_path)
    run.log({"step": 1})
    run.write_result({})
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
