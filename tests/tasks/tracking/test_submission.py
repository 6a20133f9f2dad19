"""Submissions: exactly the members that servers and toolkits expect."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.submission import export
from tasks.tracking.sequences.sequence import Sequence
from visionlora.errors import DataError

BOXES = np.array([[10.5, 20.25, 30.0, 40.0], [11.0, 21.0, 30.0, 40.0]])
SECONDS = np.array([0.125, 0.25])


def video(name: str, benchmark: str) -> Sequence:
    frames = (Path("1.jpg"), Path("2.jpg"))
    return Sequence(name, frames, BOXES[:1], benchmark=benchmark)


def members(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as stored:
        return {name: stored.read(name).decode() for name in stored.namelist()}


def test_got10k_zip_has_a_folder_per_sequence_and_its_seconds(tmp_path: Path) -> None:
    names = ("GOT-10k_Test_000001", "GOT-10k_Test_000002")
    videos = [video(name, "got10k") for name in names]
    results = {name: Result((BOXES,), SECONDS) for name in names}
    path = export("got10k", tmp_path, "mine", videos, results)
    assert path == tmp_path / "mine.zip"
    found = members(path)
    assert list(found) == [
        f"mine/{name}/{name}_{part}.txt" for name in names for part in ("001", "time")
    ]
    first = found[f"mine/{names[0]}/{names[0]}_001.txt"]
    assert first == "10.5000,20.2500,30.0000,40.0000\n11.0000,21.0000,30.0000,40.0000\n"
    assert found[f"mine/{names[0]}/{names[0]}_time.txt"] == "0.12500000\n0.25000000\n"


def test_got10k_zip_holds_all_repetitions(tmp_path: Path) -> None:
    results = {"a": Result((BOXES, BOXES, BOXES), np.ones((2, 3)))}
    found = members(export("got10k", tmp_path, "t", [video("a", "got10k")], results))
    assert list(found) == ["t/a/a_001.txt", "t/a/a_002.txt", "t/a/a_003.txt", "t/a/a_time.txt"]
    assert found["t/a/a_time.txt"].splitlines()[0].count(",") == 2


def test_trackingnet_zip_has_files_at_the_top_with_the_first_frame(tmp_path: Path) -> None:
    path = export(
        "trackingnet", tmp_path, "t", [video("a", "trackingnet")], {"a": Result((BOXES,))}
    )
    assert members(path) == {"a.txt": "10.50,20.25,30.00,40.00\n11.00,21.00,30.00,40.00\n"}


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    results = {"a": Result((BOXES,), SECONDS)}
    paths = [
        export("got10k", tmp_path / name, "t", [video("a", "got10k")], results) for name in "xy"
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_toolkits_get_folders_by_their_names(tmp_path: Path) -> None:
    results = {"a": Result((BOXES,), SECONDS)}
    export("lasot", tmp_path, "t", [video("a", "lasot")], results)
    export("pytracking", tmp_path, "t", [video("a", "uav123")], results)
    export("pytracking", tmp_path, "t", [video("a", "nfs")], results)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")) == [
        *("t/nfs_a.txt", "t/nfs_a_time.txt", "t/uav_a.txt", "t/uav_a_time.txt"),
        "t_tracking_result/a.txt",
    ]


def test_rounding_is_by_request_only(tmp_path: Path) -> None:
    videos, results = [video("a", "trackingnet")], {"a": Result((BOXES,))}
    whole = members(export("trackingnet", tmp_path, "t", videos, results, "int"))
    around = members(export("trackingnet", tmp_path, "t", videos, results, "outward"))
    assert whole["a.txt"].splitlines()[0] == "10,20,30,40"
    assert around["a.txt"].splitlines()[0] == "10,20,31,41"


def test_what_a_server_would_refuse_is_refused(tmp_path: Path) -> None:
    videos = [video("a", "got10k")]
    with pytest.raises(DataError, match=r"t, sequence a: 1 boxes for 2 frames"):
        export("got10k", tmp_path, "t", videos, {"a": Result((BOXES[:1],), SECONDS)})
    with pytest.raises(DataError, match=r"there is no a_time\.txt"):
        export("got10k", tmp_path, "t", videos, {"a": Result((BOXES,))})
    assert list(tmp_path.iterdir()) == []
