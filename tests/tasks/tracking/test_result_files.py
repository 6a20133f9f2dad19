"""Result files: what is written is what was meant, and what others wrote is read."""

from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.evaluation.result_files import (
    FORMATS,
    boxes_text,
    read_times,
    write_boxes,
    write_times,
)
from tasks.tracking.evaluation.result_folder import (
    find_files,
    missing_text,
    read_result,
    tracker_name,
)
from tasks.tracking.sequences.text import read_boxes
from visionlora.errors import DataError

BOXES = np.array([[1.0, 2.0, 30.5, 40.25], [1.23456, 2.0, 30.999, 0.00001]])


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read_back_to_its_decimals(tmp_path: Path, format: str) -> None:
    path = write_boxes(tmp_path / "a.txt", BOXES, format)
    assert read_boxes(path) == pytest.approx(BOXES, abs=0.5 * 10.0 ** -FORMATS[format].decimals)


def test_every_format_has_its_separator_and_decimals() -> None:
    first = {name: boxes_text(BOXES[:1], name) for name in FORMATS}
    assert first == {
        "pytracking": "1.000\t2.000\t30.500\t40.250\n",
        "lasot": "1.000\t2.000\t30.500\t40.250\n",
        "got10k": "1.0000,2.0000,30.5000,40.2500\n",
        "trackingnet": "1.00,2.00,30.50,40.25\n",
    }


@pytest.mark.parametrize(
    "line", ["1,2,3,4", "1\t2\t3\t4", "1 2 3 4", " 1, 2,\t3 , 4.0 ", "1,2 3\t4"]
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_tab_comma_and_space_are_read_alike(tmp_path: Path, line: str, end: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"{line}\n{line}{end}".encode())
    assert read_boxes(path).tolist() == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_nothing_is_truncated_unless_asked() -> None:
    box = np.array([[10.9, -0.5, 30.9, 40.9]])
    assert boxes_text(box, "pytracking") == "10.900\t-0.500\t30.900\t40.900\n"
    assert boxes_text(box, "pytracking", "int") == "10\t0\t30\t40\n"


def test_outward_takes_every_pixel_that_a_box_touches() -> None:
    box = np.array([[10.9, 20.0, 5.2, 5.0], [0.5, 0.5, 0.1, 0.1]])
    assert boxes_text(box, "got10k", "outward") == "10,20,7,5\n0,0,1,1\n"


def test_missing_boxes_are_nan_in_every_rounding(tmp_path: Path) -> None:
    nothing = np.full((1, 4), np.nan)
    for rounding in ("none", "int", "outward"):
        path = write_boxes(tmp_path / "a.txt", nothing, "lasot", rounding)
        assert np.isnan(read_boxes(path)).all()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1,2,3", "3 values, expected 4"),
        ("1,2,three,4", "'three' is not a number"),
        ("", "0 values"),
    ],
)
def test_unreadable_lines_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "car-2.txt"
    path.write_text(f"1,2,3,4\n{line}\n1,2,3,4\n")
    with pytest.raises(DataError, match=rf"car-2.txt line 2: {complaint}"):
        read_boxes(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.txt: No such file"):
        read_boxes(tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty.txt is empty"):
        read_boxes(tmp_path / "empty.txt")


def test_seconds_keep_eight_decimals_and_a_column_per_repetition(tmp_path: Path) -> None:
    path = write_times(tmp_path / "a_time.txt", [0.012345678, 0.5])
    assert path.read_text() == "0.01234568\n0.50000000\n"
    path = write_times(tmp_path / "b_time.txt", [[0.25, 0.5], [1, 2]])
    assert path.read_text().splitlines()[0] == "0.25000000,0.50000000"
    assert read_times(path).tolist() == [[0.25, 0.5], [1, 2]]


@pytest.mark.parametrize(
    ("benchmark", "file"),
    [
        ("lasot", "car-2.txt"),
        ("lasot", "results/car-2.txt"),
        ("uav123", "uav_car-2.txt"),
        ("nfs", "nfs_car-2.txt"),
        ("trackingnet", "car-2/car-2.txt"),
        ("got10k", "car-2/car-2_001.txt"),
    ],
)
def test_results_are_found_where_tools_put_them(tmp_path: Path, benchmark: str, file: str) -> None:
    path = write_boxes(tmp_path / file, BOXES)
    time = path.with_name(f"{path.stem.removesuffix('_001')}_time.txt")
    write_times(time, [0.1, 0.1])
    found = find_files(tmp_path, ["car-2", "bag"], benchmark)
    assert found == {"car-2": [path]}
    result = read_result(found["car-2"])
    assert len(result.repeats) == 1
    assert result.seconds is not None


def test_repetitions_belong_together(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_boxes(tmp_path / "a" / f"a_{number:03d}.txt", BOXES + number)
    write_times(tmp_path / "a" / "a_time.txt", np.ones((2, 3)))
    result = read_result(find_files(tmp_path, ["a"], "got10k")["a"])
    assert [boxes[0, 0] for boxes in result.repeats] == [2, 3, 4]
    assert result.seconds is not None
    assert result.seconds.shape == (2, 3)


def test_trackers_are_called_by_their_folder() -> None:
    assert tracker_name("some/LoRAT-B_tracking_result") == "LoRAT-B"
    assert tracker_name("runs/tiny/results") == "tiny"
    assert tracker_name("runs/tiny/") == "tiny"


def test_missing_results_are_told_with_the_nearest_file(tmp_path: Path) -> None:
    write_boxes(tmp_path / "airplane_1.txt", BOXES)
    text = missing_text(tmp_path, ["airplane-1", "b", "c", "d"], 280)
    assert text.startswith(f"{tmp_path} has no result for 4 of 280 sequences: airplane-1 (did you")
    assert "'airplane_1'" in text
    assert text.endswith("b, c and 1 more")
    with pytest.raises(DataError, match=r"no folder of results .*did you mean"):
        find_files(tmp_path.with_name(tmp_path.name[:-1] + "x"), ["a"], "lasot")
