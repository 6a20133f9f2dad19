"""Folders of results of several trackers become one report, or one clear error."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation import compare
from tasks.tracking.evaluation.compare import CompareConfig, run
from tasks.tracking.evaluation.metrics import average, score_sequence
from tasks.tracking.evaluation.result_files import write_boxes, write_times
from visionlora.errors import ConfigError, DataError
from visionlora.training.cli import parse

FRAMES = 6
NAMES = ("drive-2", "swim-3", "walk-1")


def truth(name: str) -> np.ndarray:
    """Boxes of a sequence, as LaSOT's file has them."""
    start = 20.0 + 10 * NAMES.index(name)
    return np.array([[start + 2 * step, 30.0, 24.0, 16.0] for step in range(FRAMES)])


@pytest.fixture
def lasot(tmp_path: Path) -> Path:
    """Three sequences on disk; the pictures are never opened."""
    for name in NAMES:
        write_boxes(tmp_path / "lasot" / name / "groundtruth.txt", truth(name), "lasot")
        images = tmp_path / "lasot" / name / "img"
        images.mkdir()
        for number in range(1, FRAMES + 1):
            (images / f"{number:08d}.jpg").touch()
    return tmp_path / "lasot"


def results(folder: Path, off: float, names: tuple[str, ...] = NAMES) -> Path:
    """What a tracker says that is `off` by some pixels after the first frame."""
    for name in names:
        boxes = truth(name)
        boxes[1:, 0] += off
        write_boxes(folder / f"{name}.txt", boxes, "pytracking")
        write_times(folder / f"{name}_time.txt", np.full(FRAMES, 0.25))
    return folder


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is slow, and tested elsewhere."""
    monkeypatch.setattr("tasks.tracking.evaluation.report.plot", lambda *_: [])


def config(lasot: Path, *folders: Path) -> CompareConfig:
    return CompareConfig(
        results=[str(folder) for folder in folders],
        root=str(lasot),
        output=str(lasot.parent / "report"),
    )


def test_several_trackers_are_in_one_report(
    lasot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near, far = results(tmp_path / "near", 2), results(tmp_path / "far_tracking_result", 12)
    items = run(config(lasot, far, near))
    assert [item.tracker for item in items] == ["far", "near"]
    expected = [score_sequence(truth(name), truth(name) + [2, 0, 0, 0]) for name in NAMES]  # noqa: RUF005
    assert items[1].mean.auc == pytest.approx(average(expected).auc)
    assert items[1].fps == pytest.approx(4.0)
    printed = capsys.readouterr().out
    report = tmp_path / "report"
    assert (report / "report.md").read_text().strip() in printed
    assert list(json.loads((report / "scores.json").read_text())["trackers"]) == ["near", "far"]
    assert (report / "success.png").stat().st_size > 0
    assert printed.count("wrote ") == len(list(report.iterdir()))


@pytest.mark.usefixtures("without_pictures")
def test_perfect_results_score_as_they_must(lasot: Path, tmp_path: Path) -> None:
    items = run(config(lasot, results(tmp_path / "copy", 0)))
    assert items[0].mean.auc == pytest.approx(2000 / 21)


@pytest.mark.usefixtures("without_pictures")
def test_missing_sequences_stop_or_are_skipped(
    lasot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = results(tmp_path / "whole", 2), results(tmp_path / "part", 2, NAMES[:2])
    settings = config(lasot, whole, part)
    with pytest.raises(
        DataError, match=r"part has no result for 1 of 3 sequences: walk-1.*--skip-"
    ):
        run(settings)
    items = run(replace(settings, skip_missing=True))
    assert [list(item.sequences) for item in items] == [list(NAMES[:2])] * 2
    assert "used 2 of 3 sequences" in capsys.readouterr().out


def test_a_folder_without_any_result_is_refused_even_when_skipping(
    lasot: Path, tmp_path: Path
) -> None:
    write_boxes(tmp_path / "other" / "unrelated.txt", truth("walk-1"))
    settings = replace(config(lasot, tmp_path / "other"), skip_missing=True)
    with pytest.raises(DataError, match="no result for 3 of 3 sequences: drive-2"):
        run(settings)


def test_trackers_without_a_common_sequence_are_refused(lasot: Path, tmp_path: Path) -> None:
    one, two = results(tmp_path / "a", 1, NAMES[:1]), results(tmp_path / "b", 1, NAMES[1:])
    with pytest.raises(DataError, match="no sequence has results of all trackers"):
        run(replace(config(lasot, one, two), skip_missing=True))


def test_short_results_name_tracker_sequence_and_protocol(lasot: Path, tmp_path: Path) -> None:
    folder = results(tmp_path / "short", 2)
    write_boxes(folder / "drive-2.txt", truth("drive-2")[:4])
    with pytest.raises(DataError, match=r"^short, sequence drive-2: 4 boxes for 6 .*'pytracking'"):
        run(config(lasot, folder))


def test_unreadable_lines_name_file_and_line(lasot: Path, tmp_path: Path) -> None:
    folder = results(tmp_path / "broken", 2)
    (folder / "drive-2.txt").write_text("1,2,3,4\n1,2,x,4\n")
    with pytest.raises(DataError, match=r"drive-2\.txt line 2: 'x' is not a number"):
        run(config(lasot, folder))


@pytest.mark.usefixtures("without_pictures")
def test_sequences_may_be_chosen_with_commas_or_spaces(lasot: Path, tmp_path: Path) -> None:
    settings = config(lasot, results(tmp_path / "t", 2))
    for words in (["walk-1,swim-3"], ["walk-1", "swim-3"]):
        (item,) = run(replace(settings, sequences=words))
        assert list(item.sequences) == ["walk-1", "swim-3"]


@pytest.mark.usefixtures("without_pictures")
def test_annotations_of_the_toolkit_suffice_for_lasot(tmp_path: Path) -> None:
    annos = tmp_path / "annos"
    write_boxes(annos / "walk-1.txt", truth("walk-1"))
    for part, text in (("absent", "0\n" * 5 + "1\n"), ("att", "0,1" + ",0" * 12)):
        (annos / part).mkdir()
        (annos / part / "walk-1.txt").write_text(text)
    settings = replace(config(annos, results(tmp_path / "t", 0)), sequences=["walk-1"])
    (item,) = run(settings)
    assert item.mean.op50 == pytest.approx(100 * 5 / 6)
    assert list(item.by_attribute) == ["POC"]
    with pytest.raises(DataError, match=r"no annotation of sequence 'wlk-1' .*'walk-1'"):
        run(replace(settings, sequences=["wlk-1"]))


def test_hidden_truth_is_exported_and_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data" / "TEST"
    write_boxes(root / "anno" / "a.txt", truth("walk-1")[:1], "trackingnet")
    (root / "frames" / "a").mkdir(parents=True)
    for number in range(FRAMES):
        (root / "frames" / "a" / f"{number}.jpg").touch()
    write_boxes(tmp_path / "mine" / "a.txt", truth("walk-1"))
    settings = CompareConfig(
        results=[str(tmp_path / "mine")],
        root=str(tmp_path / "data"),
        benchmark="trackingnet",
        output=str(tmp_path / "out"),
    )
    with pytest.raises(DataError, match="server"):
        run(settings)
    assert run(replace(settings, export="trackingnet")) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.zip"]
    assert f"wrote {tmp_path / 'out' / 'mine.zip'}" in capsys.readouterr().out


@pytest.mark.usefixtures("without_pictures")
def test_export_comes_beside_the_scores(lasot: Path, tmp_path: Path) -> None:
    settings = replace(config(lasot, results(tmp_path / "t", 2)), export="lasot", round="int")
    run(settings)
    text = (tmp_path / "report" / "t_tracking_result" / "drive-2.txt").read_text()
    assert text.splitlines()[1] == "24\t30\t24\t16"
    assert (tmp_path / "report" / "report.md").is_file()


def test_folders_of_one_name_need_names(lasot: Path, tmp_path: Path) -> None:
    folders = results(tmp_path / "a" / "t", 1), results(tmp_path / "b" / "t", 2)
    with pytest.raises(ConfigError, match="two folders are called 't'"):
        run(config(lasot, *folders))
    named = replace(config(lasot, *folders), names=["x", "y"])
    assert named.trackers == ["x", "y"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--results", "a", "b", "--root", "r", "--names", "x"], "--names has 1 for 2"),
        (["--results", "a", "--root", "r", "--sequences", ","], "names no sequence"),
        (["--results", "a", "--root", "r", "--round", "int"], "--round rounds what --export"),
        (["--results", "a", "--root", "r", "--protocol", "voc"], "protocol"),
        (["--results", "a", "--root", "r", "--benchmrk", "otb"], "did you mean '--benchmark'"),
    ],
)
def test_wrong_settings_are_one_clear_line(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(compare.CompareConfig, arguments)


@pytest.mark.data
@pytest.mark.usefixtures("without_pictures")
def test_real_sequences_can_be_compared(tracking_data: Path, tmp_path: Path) -> None:
    for name in ("Crossing", "bag"):
        rows = np.loadtxt(tracking_data / name / "groundtruth.txt", delimiter=",")
        write_boxes(tmp_path / "copy" / f"{name}.txt", rows)
        write_boxes(tmp_path / "static" / f"{name}.txt", np.tile(rows[0], (len(rows), 1)))
    settings = CompareConfig(
        results=[str(tmp_path / "static"), str(tmp_path / "copy")],
        root=str(tracking_data),
        sequences=["Crossing", "bag"],
        output=str(tmp_path / "report"),
    )
    static, copy = run(settings)
    assert copy.mean.auc == pytest.approx(2000 / 21)
    assert static.mean.auc < 40
