"""LaSOT and LaSOT_ext: layouts, absence, the official lists, and the real annotations."""

import tarfile

import numpy as np
import pytest

from tasks.tracking.sequences import lasot
from tasks.tracking.sequences.catalogue import load_benchmark
from tasks.tracking.sequences.found import shipped, shipped_attributes
from tasks.tracking.sequences.text import read_names
from tests.tasks.tracking.layouts import write_lasot
from visionlora.errors import DataError


def test_nested_and_flat_read_alike_and_start_from_zero(tmp_path):
    stored = write_lasot(tmp_path / "nested" / "car" / "car-2")
    write_lasot(tmp_path / "flat" / "car-2")
    (nested,) = load_benchmark("lasot", tmp_path / "nested", ["car-2"])
    (flat,) = load_benchmark("lasot", tmp_path / "flat", ["car-2"])
    np.testing.assert_array_equal(nested.boxes, flat.boxes)
    np.testing.assert_array_equal(nested.boxes, stored - [1, 1, 0, 0])
    np.testing.assert_array_equal(nested.in_file(nested.boxes), stored)
    assert nested.frames[0] == tmp_path / "nested" / "car" / "car-2" / "img" / "00000001.jpg"
    assert nested.benchmark == "lasot"


def test_absent_is_occluded_or_out_of_view(tmp_path):
    write_lasot(tmp_path / "a-1", count=4)
    (sequence,) = load_benchmark("lasot", tmp_path)
    assert not sequence.absent.any()
    (tmp_path / "a-1" / "full_occlusion.txt").write_text("0,1,0,1")
    (sequence,) = load_benchmark("lasot", tmp_path)
    assert sequence.absent.tolist() == [False, True, False, True]
    (tmp_path / "a-1" / "out_of_view.txt").write_text("0,0,1,1\n")
    (sequence,) = load_benchmark("lasot", tmp_path)
    assert sequence.absent.tolist() == [False, True, True, True]
    (tmp_path / "a-1" / "out_of_view.txt").write_text("0,0,1\n")
    with pytest.raises(DataError, match=r"out_of_view.txt has 3 flags for 4 boxes"):
        load_benchmark("lasot", tmp_path)


def test_the_annotation_says_how_many_frames_there_are(tmp_path):
    write_lasot(tmp_path / "monkey-17", count=4, images=7)
    (sequence,) = load_benchmark("lasot", tmp_path, ["monkey-17"])
    assert len(sequence) == len(sequence.boxes) == 4
    write_lasot(tmp_path / "monkey-18", count=6, images=4)
    with pytest.raises(DataError, match=r"2 of 6 frames are missing .*00000005.jpg, 00000006.jpg"):
        load_benchmark("lasot", tmp_path, ["monkey-18"])


def test_a_sequence_without_annotation_is_told_apart_from_one_that_is_not_there(tmp_path):
    write_lasot(tmp_path / "car-2")
    (tmp_path / "car-2" / "groundtruth.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*car-2/groundtruth.txt"):
        load_benchmark("lasot", tmp_path, ["car-2"])


def test_the_extension_keeps_the_numbers_of_its_files(tmp_path):
    stored = write_lasot(tmp_path / "atv" / "atv-1")
    (sequence,) = load_benchmark("lasot_ext", tmp_path, ["atv-1"])
    np.testing.assert_array_equal(sequence.boxes, stored)
    np.testing.assert_array_equal(sequence.in_file(sequence.boxes), stored)
    assert sequence.attributes == ("ROT", "VC", "SV")


def test_the_shipped_lists_are_complete_and_agree():
    names = lasot.testing_set()
    assert len(set(names)) == len(names) == 280
    classes = [name.rsplit("-", 1)[0] for name in names]
    assert {classes.count(c) for c in classes} == {4}
    assert len(set(classes)) == 70
    attributes = shipped_attributes("lasot_test_attributes.txt")
    assert tuple(attributes) == names
    extension = shipped_attributes("lasot_ext_attributes.txt")
    assert set(extension) == {f"{n.rsplit('-', 1)[0]}-{i}" for n in extension for i in range(1, 11)}
    assert len(lasot.extension_set()) == 150
    assert not {n.rsplit("-", 1)[0] for n in extension} & set(classes)
    for flags in (*attributes.values(), *extension.values()):
        assert set(flags) <= set(lasot.ATTRIBUTES)


def test_own_sequences_in_this_layout_need_no_list(tmp_path):
    for name in ("mine", "other"):
        write_lasot(tmp_path / name)
    assert [s.name for s in load_benchmark("lasot", tmp_path)] == ["mine", "other"]
    (single,) = load_benchmark("lasot", tmp_path / "mine")
    assert single.name == "mine"


@pytest.mark.data
def test_the_real_sequences_load(tracking_data):
    sequences = {s.name: s for s in load_benchmark("lasot", tracking_data)}
    assert {name: len(s) for name, s in sequences.items()} == {
        "Car1": 150, "Crossing": 120, "DragonBaby": 113, "Human7": 120, "Skiing": 81, "bag": 120
    }  # fmt: skip
    np.testing.assert_array_equal(sequences["Car1"].boxes[0], [22, 87, 66, 55])
    assert not any(s.absent.any() for s in sequences.values())


@pytest.mark.slow
@pytest.mark.data
def test_the_280_real_annotations_parse(tracking_data, tmp_path):
    with tarfile.open(tracking_data / "lasot_annos" / "lasot_test_annos.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    published = tmp_path / "testing_set.txt"
    assert not published.read_bytes().endswith(b"\n")
    assert tuple(read_names(published)) == lasot.testing_set()
    assert len(shipped("lasot_testing_set.txt")) == 280
    attributes = shipped_attributes("lasot_test_attributes.txt")
    frames = absent = 0
    degenerate = []
    for name in lasot.testing_set():
        annotation = lasot.read_annotation(tmp_path / "annos", name)
        assert annotation.attributes == attributes[name]
        frames += len(annotation.boxes)
        absent += int(annotation.absent.sum())
        small = (annotation.boxes[:, 2:] <= 0).any(axis=1) & ~annotation.absent
        degenerate += [(name, int(row) + 1) for row in np.flatnonzero(small)]
    assert (frames, absent) == (685_360, 18_346)
    assert sorted(degenerate) == [("lion-5", 553), ("microphone-6", 1109), ("tiger-6", 118)]
