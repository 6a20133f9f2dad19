"""Boxes out of text files, files of frames, and what is said when something is not there."""

import numpy as np
import pytest

from tasks.tracking.sequences.catalogue import BENCHMARKS, find_sequences, load_benchmark
from tasks.tracking.sequences.frames import NumberedFrames, listed, numbered
from tasks.tracking.sequences.sequence import Sequence
from tasks.tracking.sequences.text import read_boxes, read_flags, read_names
from tests.tasks.tracking.layouts import moving, write_frames, write_lasot
from visionlora.errors import ConfigError, DataError


@pytest.mark.parametrize("separator", [",", "\t", " ", ", ", ",\t", "   "])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_separators_and_line_ends_read_alike(tmp_path, separator, ending):
    file = tmp_path / "groundtruth.txt"
    rows = [("23", "88.00", "6.6e1", "55"), ("1", "2", "3", "4"), ("NaN", "nan", "NaN", "nan")]
    file.write_bytes(ending.join(separator.join(row) for row in rows).encode())
    expected = np.array([[23, 88, 66, 55], [1, 2, 3, 4], [np.nan] * 4])
    np.testing.assert_array_equal(read_boxes(file), expected)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + ending.encode() * 3)
    np.testing.assert_array_equal(read_boxes(file), expected)


def test_corners_become_their_axis_aligned_hull(tmp_path):
    file = tmp_path / "groundtruth.txt"
    file.write_text("10,5,20,8,18,30,7,25\n")
    np.testing.assert_array_equal(read_boxes(file), [[7, 5, 13, 25]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,4\n1,2,x,4\n", r"line 2: 'x' is not a number"),
        ("1,2,3,4\n1,2,3\n", r"line 2: 3 values, expected 4"),
        ("1,2,3,4\n\n1,2,3,4\n", r"line 2: 0 values, expected 4"),
        ("1,2,3,4\n1,2,inf,4\n", r"line 2: 'inf' is not a number"),
        ("1,2,3,4\n# 2,3,4\n", r"line 2: '#' is not a number"),
        ("1,2,3\n1,2,3\n", r"line 1: 3 values, expected 4 or 8"),
        ("\n", "is empty"),
        ("\x00\x01\x02", "line 1"),
    ],
)
def test_unreadable_numbers_are_told_with_file_and_line(tmp_path, text, message):
    file = tmp_path / "groundtruth.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_boxes(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_on_one_line_and_on_many_are_the_same(tmp_path):
    (tmp_path / "row").write_text("0,1,1,0\n")
    (tmp_path / "column").write_text("0\n1\n1\n0")
    np.testing.assert_array_equal(read_flags(tmp_path / "row", 4), [False, True, True, False])
    np.testing.assert_array_equal(read_flags(tmp_path / "column", 4), [False, True, True, False])
    with pytest.raises(DataError, match="4 flags for 5 boxes"):
        read_flags(tmp_path / "row", 5)
    (tmp_path / "row").write_text("0,2")
    with pytest.raises(DataError, match="0 or 1, not '2'"):
        read_flags(tmp_path / "row", 2)


def test_a_list_without_a_final_line_end_keeps_its_last_name(tmp_path):
    (tmp_path / "list.txt").write_text("a-1\nb-2\nc-3")
    assert read_names(tmp_path / "list.txt") == ["a-1", "b-2", "c-3"]


def test_numbered_frames_are_paths_when_asked_for(tmp_path):
    frames = NumberedFrames(tmp_path, "{:08d}.jpg", range(1, 14_000_001))
    assert len(frames) == 14_000_000
    assert frames[-1] == tmp_path / "14000000.jpg"
    assert [path.name for path in frames[2:4]] == ["00000003.jpg", "00000004.jpg"]
    with pytest.raises(IndexError):
        frames[14_000_000]


def test_missing_frames_are_named_and_counted(tmp_path):
    write_frames(tmp_path, (f"{i:04d}.png" for i in (1, 2, 5, 9)))
    with pytest.raises(DataError, match=r"6 of 10 .* 0003.png, 0004.png, 0006.png and 3 more"):
        numbered(tmp_path, 4, range(1, 11))
    assert numbered(tmp_path, 4, range(1, 3))[1].name == "0002.png"
    with pytest.raises(DataError, match="no frames in"):
        numbered(tmp_path / "img", 4, range(1, 11))


def test_listed_frames_follow_their_numbers(tmp_path):
    write_frames(tmp_path, ["f10.png", "f9.jpg", "f1.jpg", "²f.png", ".f3.png"])
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in listed(tmp_path)] == ["f1.jpg", "f9.jpg", "f10.png", "²f.png"]


@pytest.mark.parametrize("first", [[1, 2, 0, 4], [1, 2, 3, -4], [np.nan] * 4])
def test_a_first_box_without_area_cannot_be_tracked(tmp_path, first):
    with pytest.raises(DataError, match="first box is"):
        Sequence("a", (tmp_path / "1.jpg",), np.array([first], dtype=float))


def test_more_boxes_than_frames_are_refused_and_fewer_are_not(tmp_path):
    frames = (tmp_path / "1.jpg", tmp_path / "2.jpg")
    assert len(Sequence("a", frames, moving(1))) == 2
    with pytest.raises(DataError, match="2 frames but 3 boxes"):
        Sequence("a", frames, moving(3))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_root_says_which_layout_is_looked_for(tmp_path, name):
    (tmp_path / "tracking").mkdir()
    with pytest.raises(
        DataError, match=r"does not exist .did you mean 'tracking'.*ROOT/"
    ) as caught:
        load_benchmark(name, tmp_path / "trackin")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no sequences in .*ROOT/"):
        load_benchmark(name, tmp_path / "tracking")


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'lasot'"):
        load_benchmark("lasto", ".")


def test_a_sequence_that_is_not_there_names_the_nearest(tmp_path):
    write_lasot(tmp_path / "car-2")
    write_lasot(tmp_path / "dog-1")
    with pytest.raises(DataError, match=r"sequence 'car-22' .did you mean 'car-2'.* holds 2"):
        load_benchmark("lasot", tmp_path, ["car-22", "dog-1"])
    with pytest.raises(DataError, match="no sequences were asked for"):
        load_benchmark("lasot", tmp_path, [])


def test_skip_missing_returns_what_is_there_and_what_is_not(tmp_path):
    write_lasot(tmp_path / "airplane" / "airplane-1")
    write_lasot(tmp_path / "zebra" / "zebra-17")
    write_lasot(tmp_path / "zebra" / "zebra-1")  # not in the test set
    with pytest.raises(DataError, match=r"'airplane-9'.* and 277 more of 280 .*skip_missing"):
        load_benchmark("lasot", tmp_path)
    there = load_benchmark("lasot", tmp_path, skip_missing=True)
    assert [sequence.name for sequence in there] == ["airplane-1", "zebra-17"]
    selection = find_sequences("lasot", tmp_path, skip_missing=True)
    assert len(selection.missing) == 278
    assert load_benchmark("lasot", tmp_path, ["zebra-1"])[0].name == "zebra-1"


def test_skip_missing_does_not_hide_an_incomplete_sequence(tmp_path):
    write_lasot(tmp_path / "airplane-1", count=5)
    (tmp_path / "airplane-1" / "img" / "00000003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 5 frames are missing .*: 00000003.jpg"):
        load_benchmark("lasot", tmp_path, skip_missing=True)


def test_two_sequences_of_one_name_are_refused(tmp_path):
    write_lasot(tmp_path / "a" / "car-1")
    write_lasot(tmp_path / "b" / "car-1")
    with pytest.raises(DataError, match="two sequences are called 'car-1'"):
        load_benchmark("lasot", tmp_path)
