"""TNL2K, UAV123, OTB-100 and NFS: sets with habits of their own."""

import itertools

import numpy as np
import pytest

from tasks.tracking.sequences import nfs, otb, uav123
from tasks.tracking.sequences.catalogue import load_benchmark
from tests.tasks.tracking.layouts import moving, write_frames, write_lines, write_nfs, write_otb
from visionlora.errors import DataError


def test_tnl2k_takes_any_image_names_in_order(tmp_path):
    for home in (tmp_path / "plain", tmp_path / "nested" / "TNL2K_test_subset"):
        write_frames(home / "Arrow_done" / "imgs", ("x-2.png", "x-10.png", "x-1.png"))
        write_lines(home / "Arrow_done" / "groundtruth.txt", moving(3))
    for root in (tmp_path / "plain", tmp_path / "nested"):
        (sequence,) = load_benchmark("tnl2k", root)
        assert [path.stem for path in sequence.frames] == ["x-1", "x-2", "x-10"]
    write_lines(tmp_path / "plain" / "Arrow_done" / "groundtruth.txt", moving(2))
    with pytest.raises(DataError, match="3 frames but 2 boxes; TNL2K has a box for every image"):
        load_benchmark("tnl2k", tmp_path / "plain")


def test_uav123_has_123_parts_of_91_videos_that_do_not_overlap():
    parts = uav123.parts()
    assert len(parts) == 123
    assert len({part.video for part in parts.values()}) == 91
    assert sum(part.end - part.start + 1 for part in parts.values()) == 112_578
    starts = sorted((part.video, part.start, part.end) for part in parts.values())
    for before, after in itertools.pairwise(starts):
        assert before[0] != after[0] or before[2] <= after[1]


def test_uav123_sequence_is_its_part_of_the_video(tmp_path):
    later = {name: part for name, part in uav123.parts().items() if part.start > 1}
    name = min(later, key=lambda name: later[name].end - later[name].start)
    part, count = later[name], later[name].end - later[name].start + 1
    boxes = moving(count)
    boxes[7] = np.nan
    video = tmp_path / "UAV123" / "data_seq" / "UAV123" / part.video
    video.mkdir(parents=True)
    for number in range(part.start - 1, part.end + 2):
        (video / f"{number:06d}.jpg").touch()
    annotation = tmp_path / "UAV123" / "anno" / "UAV123" / f"{name}.txt"
    write_lines(annotation, boxes)
    for root in (tmp_path, tmp_path / "UAV123"):
        (sequence,) = load_benchmark("uav123", root, [name])
        assert sequence.frames[0].name == f"{part.start:06d}.jpg"
        assert sequence.frames[-1].name == f"{part.end:06d}.jpg"
        np.testing.assert_array_equal(sequence.boxes, boxes)
        assert sequence.attributes == part.attributes
    write_lines(annotation, boxes[:-1])
    with pytest.raises(DataError, match=f"{count - 1} boxes; {name} is frames {part.start} to"):
        load_benchmark("uav123", tmp_path, [name])


def test_uav20l_takes_whole_videos(tmp_path):
    write_frames(tmp_path / "data_seq" / "UAV123" / "bike1", (f"{i:06d}.jpg" for i in range(1, 8)))
    write_lines(tmp_path / "anno" / "UAV20L" / "bike1.txt", moving(6))
    (sequence,) = load_benchmark("uav20l", tmp_path)
    assert (sequence.name, len(sequence), sequence.benchmark) == ("bike1", 6, "uav20l")


def test_otb_starts_where_the_annotation_does(tmp_path):
    write_otb(tmp_path / "David", first=300, count=4)
    write_otb(tmp_path / "Car4", first=1, count=3)
    write_otb(tmp_path / "Tiger1", first=1, count=8)
    david, car, tiger = load_benchmark("otb", tmp_path, ["David", "Car4", "Tiger1"])
    assert [path.name for path in david.frames] == ["0300.jpg", "0301.jpg", "0302.jpg", "0303.jpg"]
    assert [path.name for path in car.frames] == ["0001.jpg", "0002.jpg", "0003.jpg"]
    assert [path.name for path in tiger.frames] == ["0006.jpg", "0007.jpg", "0008.jpg"]
    np.testing.assert_array_equal(david.boxes, moving(4))
    np.testing.assert_array_equal(tiger.boxes, moving(8)[5:])
    assert "IV" in david.attributes


def test_otb_videos_with_two_targets_are_two_sequences(tmp_path):
    for target in (1, 2):
        write_otb(tmp_path / "Jogging", 1, 2 + target, f"groundtruth_rect.{target}.txt")
    first, second = load_benchmark("otb", tmp_path, ["Jogging_1", "Jogging_2"])
    assert (len(first), len(second)) == (3, 4)
    assert first.frames[0] == second.frames[0]
    with pytest.raises(DataError, match=r"'Jogging' .did you mean 'Jogging_"):
        load_benchmark("otb", tmp_path, ["Jogging"])


def test_otb_has_100_names():
    names = otb.names()
    assert len(set(names)) == 100
    assert {"Human4_2", "Jogging_1", "Jogging_2", "Skating2_1", "Skating2_2"} <= set(names)
    assert not {"Human4", "Human4_1", "Jogging", "Skating2"} & set(names)


def test_nfs_keeps_every_eighth_box(tmp_path):
    boxes = write_nfs(tmp_path, "mine", count=20, at_30=3)
    (sequence,) = load_benchmark("nfs", tmp_path)
    np.testing.assert_array_equal(sequence.boxes, boxes[[0, 8, 16]])
    assert [path.name for path in sequence.frames] == ["00001.jpg", "00002.jpg", "00003.jpg"]
    assert len(nfs.lengths()) == 100
    assert nfs.lengths()["Gymnastics"] == 368


def test_nfs_leaves_a_frame_without_a_line_empty_and_drops_boxes_beyond_the_video(tmp_path):
    write_nfs(tmp_path, "mine", count=33, at_30=4)
    file = tmp_path / "mine" / "30" / "mine.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for i, line in enumerate(lines) if i != 8))
    (sequence,) = load_benchmark("nfs", tmp_path)
    assert np.isnan(sequence.boxes[:, 0]).tolist() == [False, True, False, False]
    file.write_text("\n".join([*lines[:3], 'not a line "ball"']))
    with pytest.raises(DataError, match=r"mine.txt line 4: expected id xmin"):
        load_benchmark("nfs", tmp_path)
    file.write_text("\n".join(lines[8:]))
    with pytest.raises(DataError, match="no box for the first frame"):
        load_benchmark("nfs", tmp_path)


def test_nfs_whose_boxes_were_converted_before(tmp_path):
    write_frames(tmp_path / "sequences" / "mine", ("00001.jpg", "00002.jpg"))
    write_lines(tmp_path / "anno" / "nfs_mine.txt", moving(2), separator="\t")
    (sequence,) = load_benchmark("nfs", tmp_path)
    np.testing.assert_array_equal(sequence.boxes, moving(2))


def test_nfs_video_of_the_benchmark_needs_all_its_frames(tmp_path):
    count = nfs.lengths()["Skiing_red"]
    write_nfs(tmp_path, "Skiing_red", count=8 * count, at_30=count - 1)
    with pytest.raises(DataError, match=f"1 of {count} frames are missing .*{count:05d}.jpg"):
        load_benchmark("nfs", tmp_path, ["Skiing_red"])
