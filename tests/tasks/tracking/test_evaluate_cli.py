"""Evaluations end to end: figures, files, what a stopped run keeps, errors in one line."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluate import EvaluateConfig, run
from tasks.tracking.sequences.catalogue import BENCHMARKS
from tasks.tracking.sequences.text import read_boxes
from tasks.tracking.trackers.catalogue import tracker_names
from tests.tasks.tracking.oracle import Oracle, path_of, sequence
from visionlora.errors import ConfigError, DataError, OutputError
from visionlora.training.cli import parse

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "track.py"
KEYS = (
    *("task", "tracker", "benchmark", "protocol", "sequences"),
    *("auc", "precision", "norm_precision", "op50", "op75"),
    *("fps", "trainable_parameters", "parameters"),
)
LENGTHS = {"car-1": 6, "cat-2": 3, "dog-3": 4}


@pytest.fixture
def root(tmp_path):
    """Three sequences in LaSOT's layout, flat, whose annotations count from 1."""
    for seed, (name, count) in enumerate(LENGTHS.items()):
        sequence(tmp_path / "data" / name, "img", count, seed)
        lines = (path_of(count, seed) + np.array([1, 1, 0, 0])).tolist()
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        (tmp_path / "data" / name / "groundtruth.txt").write_text(text)
    return tmp_path / "data"


@pytest.fixture
def config(root, tmp_path):
    def make(**options):
        options = {"output": str(tmp_path / "out"), "plots": False, **options}
        return EvaluateConfig(tracker="static", root=str(root), **options)

    return make


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """Return a function that runs the script in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return caught.value.code, *capfd.readouterr()

    return call


class Counting(Oracle):
    """An oracle that remembers how many sequences it started, and may be stopped in one."""

    started = 0
    stop_at = None

    def __copy__(self):
        Counting.started += 1
        if Counting.started == Counting.stop_at:
            raise KeyboardInterrupt
        return self


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(Counting, "started", 0)
    monkeypatch.setattr(Counting, "stop_at", None)
    return Counting()


def test_a_perfect_tracker_has_the_best_score_there_is(config, tmp_path):
    result = run(config(), Oracle())
    assert tuple(result)[: len(KEYS)] == KEYS
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert [result[key] for key in KEYS[:5]] == ["tracking", "static", "lasot", "pytracking", 3]
    assert result["auc"] == pytest.approx(100 * 20 / 21, abs=1e-3)
    assert result["precision"] == result["norm_precision"] == result["op75"] == 100
    assert result["fps"] > 0
    assert (result["trainable_parameters"], result["parameters"]) == (0, 0)


def test_result_files_count_pixels_as_the_annotation_does(config, root, tmp_path):
    run(config(), Oracle())
    for name, count in LENGTHS.items():
        boxes = read_boxes(tmp_path / "out" / "results" / f"{name}.txt")
        assert len(boxes) == count
        np.testing.assert_allclose(boxes, read_boxes(root / name / "groundtruth.txt"), atol=0.1)


def test_reports_are_written_beside_the_result(config, tmp_path, capsys):
    run(config(export="lasot"), Oracle())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.md", "sequences.csv", "scores.json", "static_tracking_result"} <= names
    assert not any(name.endswith(".png") for name in names)
    assert "pytracking" in capsys.readouterr().out


def test_a_stopped_run_goes_on_where_it_was(config, counting, tmp_path):
    Counting.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(config(), counting)
    done = tmp_path / "out" / "results"
    kept = {path: path.stat().st_mtime_ns for path in done.glob("*.txt")}
    assert {path.stem for path in kept} >= {"car-1", "cat-2"}
    assert not (tmp_path / "out" / "result.json").exists()
    Counting.started, Counting.stop_at = 0, None
    result = run(config(resume=True), counting)
    assert Counting.started == 1
    assert result["sequences"] == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_finished_run_is_not_replaced_by_accident(config, counting):
    run(config(), counting)
    with pytest.raises(OutputError, match="--resume"):
        run(config(), counting)
    run(config(resume=True), counting)
    assert Counting.started == 3
    run(config(overwrite=True), counting)
    assert Counting.started == 6


def test_another_tracker_does_not_continue_the_run(config, tmp_path):
    run(config(), Oracle())
    other = EvaluateConfig(
        tracker="ncc", root=config().root, output=str(tmp_path / "out"), resume=True
    )
    with pytest.raises(ConfigError, match="tracker was 'static' and is 'ncc'"):
        run(other, Oracle())


def test_another_protocol_scores_the_same_files(config, counting):
    first = run(config(), counting)
    second = run(config(resume=True, protocol="lasot", batch=2), counting)
    assert Counting.started == 3
    assert (first["protocol"], second["protocol"]) == ("pytracking", "lasot")
    assert second["auc"] == first["auc"]


def test_sequences_with_damaged_frames_fail_alone(config, root, tmp_path, capsys):
    (root / "cat-2" / "img" / "00000002.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"1 of 3 sequences cannot be tracked \(cat-2\)"):
        run(config(batch=2), Oracle())
    assert "00000002.png" in capsys.readouterr().err
    finished = {path.stem for path in (tmp_path / "out" / "results").glob("*-?.txt")}
    assert finished == {"car-1", "dog-3"}
    left = config(resume=True, sequences=["car-1,dog-3"])
    assert run(left, Oracle())["sequences"] == 2


def test_damaged_results_are_named(config, tmp_path):
    run(config(), Oracle())
    file = tmp_path / "out" / "results" / "dog-3.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"dog-3.txt has 3 boxes.*4 frames"):
        run(config(resume=True), Oracle())


def test_sequences_are_chosen_by_name(config):
    result = run(config(sequences=["dog-3,", " car-1"]), Oracle())
    assert result["sequences"] == 2
    with pytest.raises(DataError, match=r"sequence 'dog-4' \(did you mean 'dog-3'"):
        run(config(sequences=["dog-4"]), Oracle())
    with pytest.raises(ConfigError, match="names no sequence"):
        config(sequences=[","])


def test_missing_sequences_can_be_skipped(config, capsys):
    chosen = {"sequences": ["dog-3", "dog-4"], "skip_missing": True}
    assert run(config(**chosen), Oracle())["sequences"] == 1
    assert "1 of 2 sequences" in capsys.readouterr().out


def test_a_first_frame_alone_can_be_tracked_but_not_scored(root, tmp_path, capsys):
    for name in LENGTHS:
        truth = root / name / "groundtruth.txt"
        truth.write_text(truth.read_text().splitlines()[0] + "\n")
    config = EvaluateConfig(benchmark="folder", root=str(root), output=str(tmp_path / "out"))
    result = run(config, Oracle())
    assert result["auc"] is None
    assert len(read_boxes(tmp_path / "out" / "results" / "car-1.txt")) == 6
    assert "no figures" in capsys.readouterr().out


def test_refused_runs_leave_nothing_behind(config, tmp_path):
    with pytest.raises(DataError):
        run(config(sequences=["nothing"]), Oracle())
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_script(script, root, tmp_path):
    code, out, _ = script(
        *("evaluate", "--tracker", "static", "--benchmark", "lasot", "--root", root),
        *(
            "--sequences",
            "car-1,dog-3",
            "--protocol",
            "pytracking",
            "--output",
            tmp_path / "run",
            "--plots",
            "false",
        ),
    )
    assert code == 0
    assert "| static" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["auc"] < 95
    code, out, _ = script(
        *("video", root / "car-1", "--box", "60,45,24,20", "--tracker", "static"),
        *("--output", tmp_path / "clip"),
    )
    assert code == 0
    assert "6 frames" in out
    assert (tmp_path / "clip" / "video.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evalute"], "unknown command 'evalute' (did you mean 'evaluate'"),
        ([], "no command; known: train, evaluate, video, compare"),
        (["evaluate", "--root", "nowhere"], "nowhere does not exist"),
        (["evaluate", "--tracker", "lorat-b-24", "--root", "."], "did you mean 'lorat-b-224'"),
        (["evaluate", "--root", ".", "--protocol", "otb"], "pytracking, lasot, stark, got10k"),
        (["evaluate", "--root", ".", "--bench", "a"], "did you mean '--benchmark'"),
        (["evaluate", "--root", ".", "--benchmark", "lasott"], "did you mean 'lasot'"),
        (["compare", "--root", ".", "--results", "nowhere"], "no folder of results"),
        (["evaluate", "--root", ".", "--round", "int"], "--round rounds what --export writes"),
        (["evaluate"], "missing option --root"),
        (["video", "clip.mp4", "--box", "1,2,3"], "four numbers x,y,w,h"),
        (["video", "clip.mp4"], "missing option --box"),
        (["video", "clip.mp4", "--box", "1,2,3,4"], "no video 'clip.mp4'"),
    ],
)
def test_mistakes_are_answered_in_one_line(script, words, says, root):
    code, _, errors = script(*(str(root) if word == "." else word for word in words))
    assert code == 2
    assert says in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tracking").glob("evaluate-*.yaml")))
def test_configurations_that_ship_are_valid(file):
    config = parse(EvaluateConfig, ["--config", str(file), "--root", "DIR"])
    assert config.tracker in tracker_names()
    assert config.benchmark in BENCHMARKS


@pytest.mark.slow
def test_a_killed_process_is_continued(root, tmp_path):
    for index in range(20):
        sequence(root / f"long-{index}", "img", 30, index)
        text = "".join(",".join(map(str, line)) + "\n" for line in path_of(30, index).tolist())
        (root / f"long-{index}" / "groundtruth.txt").write_text(text)
    words = [sys.executable, str(SCRIPT), "evaluate", "--tracker", "ncc", "--root", str(root)]
    words += ["--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = tmp_path / "run" / "results"
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(done.glob("*.txt"))) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in done.glob("*.txt")}
    assert 6 <= len(kept) < 46
    subprocess.run([*words, "--resume"], env=environment, check=True, capture_output=True)
    boxes = [path for path in kept if not path.stem.endswith("_time")]
    assert all(path.stat().st_mtime_ns == kept[path] for path in boxes)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sequences"] == 23
    assert any(path.suffix == ".png" for path in (tmp_path / "run").iterdir())
    words[2:5] = ["compare", "--results", str(tmp_path / "run")]
    words[-1] = str(tmp_path / "report")
    told = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    row = (tmp_path / "run" / "report.md").read_text().splitlines()[2]
    assert row.startswith("| ncc     |")
    assert "| run     |" + row[11:40] in told.stdout  # results are called by their folder
