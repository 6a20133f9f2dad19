"""Any folder of sequences: own data, in the layouts that people have."""

import numpy as np
import pytest

from tasks.tracking.sequences.catalogue import load_benchmark
from tests.tasks.tracking.layouts import moving, write_frames, write_lines
from visionlora.errors import DataError


@pytest.mark.parametrize("images", ["", "img", "imgs", "images", "frames", "color"])
@pytest.mark.parametrize("truth", ["groundtruth.txt", "groundtruth_rect.txt"])
def test_images_lie_beside_the_boxes_or_below(tmp_path, images, truth):
    folder = tmp_path / "walk"
    write_frames(folder / images, ("frame_2.png", "frame_10.png", "frame_1.png"))
    write_lines(folder / truth, moving(3), separator=" ")
    (sequence,) = load_benchmark("folder", tmp_path)
    assert [path.name for path in sequence.frames] == ["frame_1.png", "frame_2.png", "frame_10.png"]
    np.testing.assert_array_equal(sequence.boxes, moving(3))  # 0-based as it is
    assert (sequence.name, sequence.origin, sequence.absent) == ("walk", 0, None)


def test_folders_of_classes_and_a_single_sequence_are_found(tmp_path):
    for place in ("cars/red", "cars/blue", "dog"):
        write_frames(tmp_path / place, ("1.jpg", "2.jpg"))
        write_lines(tmp_path / place / "groundtruth.txt", moving(2))
    assert [s.name for s in load_benchmark("folder", tmp_path)] == ["blue", "red", "dog"]
    assert [s.name for s in load_benchmark("folder", tmp_path / "dog")] == ["dog"]
    assert [s.name for s in load_benchmark("folder", tmp_path, ["red"])] == ["red"]


def test_one_box_is_enough_to_track_all_frames(tmp_path):
    write_frames(tmp_path / "a", (f"{i}.jpg" for i in range(4)))
    write_lines(tmp_path / "a" / "groundtruth.txt", moving(1))
    (sequence,) = load_benchmark("folder", tmp_path)
    assert (len(sequence), len(sequence.boxes)) == (4, 1)


def test_counts_that_differ_name_the_rule_and_the_gap(tmp_path):
    write_frames(tmp_path / "a", (f"{i:03d}.jpg" for i in (1, 2, 4, 5)))
    write_lines(tmp_path / "a" / "groundtruth.txt", moving(5))
    with pytest.raises(
        DataError, match=r"'a' has 4 frames but 5 boxes \(003.jpg is missing .*box for every frame"
    ):
        load_benchmark("folder", tmp_path)
    write_lines(tmp_path / "a" / "groundtruth.txt", moving(3))
    with pytest.raises(DataError, match="4 frames but 3 boxes"):
        load_benchmark("folder", tmp_path)


def test_corners_of_vot_are_read_as_boxes(tmp_path):
    write_frames(tmp_path / "a" / "color", ("00000001.jpg",))
    write_lines(tmp_path / "a" / "groundtruth.txt", [[10, 5, 20, 8, 18, 30, 7, 25]])
    (sequence,) = load_benchmark("folder", tmp_path)
    np.testing.assert_array_equal(sequence.boxes, [[7, 5, 13, 25]])


def test_a_folder_without_images_is_refused(tmp_path):
    write_lines(tmp_path / "a" / "groundtruth.txt", moving(2))
    with pytest.raises(DataError, match="no images in"):
        load_benchmark("folder", tmp_path)
