"""What training keeps: clipped boxes, cut heads and tails, objects of photographs."""

import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from tasks.tracking.images import read_image
from tasks.tracking.sequences import json_stream, lasot
from tasks.tracking.sequences.catalogue import load_training
from tasks.tracking.sequences.clean import clean
from tests.tasks.tracking.layouts import (
    SIZE,
    moving,
    write_frames,
    write_got10k,
    write_lasot,
    write_lines,
    write_trackingnet,
)
from visionlora.errors import ConfigError, DataError

NAN = [np.nan] * 4


def frames(tmp_path, count):
    return tuple(tmp_path / f"{i}.jpg" for i in range(count))


def test_boxes_are_clipped_and_what_is_left_of_nothing_does_not_exist(tmp_path):
    boxes = np.array(
        [[-5, -5, 10, 10], [35, 25, 10, 10], [40, 5, 3, 3], [5, 5, 0, 4], [5, 5, 4, -2], NAN,
         [-9, -9, 99, 99]]
    )  # fmt: skip
    track = clean("a", frames(tmp_path, 7), boxes, None, SIZE, "x")
    assert track.exists.tolist() == [True, True, False, False, False, False, True]
    expected = [[0, 0, 5, 5], [35, 25, 5, 5], NAN, NAN, NAN, NAN, [0, 0, *SIZE]]
    np.testing.assert_array_equal(track.boxes, expected)


def test_heads_and_tails_without_the_object_are_cut_off(tmp_path):
    exists = np.array([0, 0, 1, 0, 1, 0], dtype=bool)
    track = clean("a", frames(tmp_path, 8), moving(6), exists, SIZE, "x")
    assert [path.stem for path in track.frames] == ["2", "3", "4"]
    assert track.exists.tolist() == [True, False, True]
    np.testing.assert_array_equal(track.boxes[[0, 2]], moving(6)[[2, 4]])
    assert np.isnan(track.boxes[1]).all()
    assert clean("a", frames(tmp_path, 6), moving(6), exists & False, SIZE, "x") is None


def test_lasot_trains_on_what_is_not_in_its_test_set_and_starts_from_zero(tmp_path):
    stored = write_lasot(tmp_path / "car" / "car-1", count=4)
    write_lasot(tmp_path / "car" / "car-2", count=4)
    assert "car-2" in lasot.testing_set()
    (tmp_path / "car" / "car-1" / "full_occlusion.txt").write_text("1,0,0,0")
    (track,) = load_training("lasot", tmp_path)
    assert track.name == "car-1"
    np.testing.assert_array_equal(track.boxes, (stored - [1, 1, 0, 0])[1:])
    assert track.frames[0].name == "00000002.jpg"


def test_got10k_leaves_absent_frames_out_and_reads_the_size_from_its_file(tmp_path):
    folder = tmp_path / "train" / "GOT-10k_Train_000001"
    write_got10k(folder, count=5)
    (track,) = load_training("got10k", tmp_path)
    assert track.exists.tolist() == [True, True, True, False, True]
    (folder / "meta_info.ini").write_text("[METAINFO]\nresolution: (9, 30)\n")
    (track,) = load_training("got10k", tmp_path)
    assert track.boxes[0].tolist() == [4, 5, 5, 8]
    (folder / "meta_info.ini").unlink()
    (track,) = load_training("got10k", tmp_path)
    assert track.boxes[0].tolist() == [4, 5, 10, 8]


def test_got10k_names_training_sequences_that_are_missing(tmp_path):
    write_got10k(tmp_path / "train" / "GOT-10k_Train_000001")
    (tmp_path / "train" / "list.txt").write_text("GOT-10k_Train_000001\nGOT-10k_Train_000002\n")
    with pytest.raises(DataError, match=r"1 of 2 training sequences .* GOT-10k_Train_000002"):
        load_training("got10k", tmp_path)
    with pytest.raises(DataError, match="all 9335 of"):
        load_training("got10k_vot", tmp_path)


def test_trackingnet_trains_on_the_chunks_that_are_there(tmp_path):
    for chunk in ("TRAIN_0", "TRAIN_11", "TEST"):
        write_trackingnet(tmp_path / chunk, f"video_{chunk}", first_only=False)
    tracks = load_training("trackingnet", tmp_path)
    assert [track.name for track in tracks] == ["video_TRAIN_0", "video_TRAIN_11"]
    assert tracks[0].frames[0] == tmp_path / "TRAIN_0" / "frames" / "video_TRAIN_0" / "0.jpg"
    np.testing.assert_array_equal(tracks[0].boxes, moving(5))


def test_own_folders_can_be_trained_on(tmp_path):
    write_frames(tmp_path / "a", (f"{i}.jpg" for i in range(3)))
    write_lines(tmp_path / "a" / "groundtruth.txt", [[1, 2, 3, 4], NAN, [2, 2, 3, 4]])
    (track,) = load_training("folder", tmp_path)
    assert track.exists.tolist() == [True, False, True]


def test_photographs_that_lie_on_their_side_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "a").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "a" / "1.jpg", exif=exif)
    assert read_image(tmp_path / "a" / "1.jpg").shape[:2] == SIZE
    write_lines(tmp_path / "a" / "groundtruth.txt", [[0, 0, 99, 99]])
    (track,) = load_training("folder", tmp_path)
    assert track.boxes.tolist() == [[0, 0, SIZE[1], SIZE[0]]]


def coco(root, annotations, images="train2017"):
    write_frames(root / images, ("000000000009.jpg",))
    content = {
        "info": {"note": 'a "quoted" [bracket'},
        "version": 12,
        "licenses": [],
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 40, "height": 30}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    file = root / "annotations" / "instances_train2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("images", ["train2017", "images/train2017"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_objects_of_coco_are_tracks_of_one_frame(tmp_path, monkeypatch, piece, images):
    monkeypatch.setattr(json_stream, "PIECE", piece)
    row = {"image_id": 9, "iscrowd": 0, "segmentation": [[1.5, 2, 3]]}
    coco(
        tmp_path,
        [
            {**row, "id": 1, "bbox": [4, 5, 10, 8]},
            {**row, "id": 2, "bbox": [4, 5, 10, 8], "iscrowd": 1},
            {**row, "id": 3, "bbox": [4, 5, 0, 8]},
            {**row, "id": 4, "bbox": [35, 5, 10.5, 8]},
        ],
        images,
    )
    tracks = load_training("coco", tmp_path)
    assert [track.name for track in tracks] == ["000000000009"] * 2  # of one photograph
    assert [track.boxes.tolist() for track in tracks] == [[[4, 5, 10, 8]], [[35, 5, 5, 8]]]
    assert tracks[0].frames == (tmp_path / images / "000000000009.jpg",)


def test_damaged_coco_files_are_told(tmp_path):
    file = coco(tmp_path, [{"id": 1, "image_id": 10, "bbox": [1, 2, 3, 4]}])
    with pytest.raises(DataError, match="is not COCO's annotation"):
        load_training("coco", tmp_path)
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match="is not complete JSON"):
        load_training("coco", tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(DataError, match="is not complete JSON"):
        load_training("coco", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*instances_train2017.json"):
        load_training("coco", tmp_path)


@pytest.mark.parametrize("name", ["lasot", "got10k", "got10k_vot", "trackingnet", "coco", "folder"])
def test_an_empty_root_says_which_layout_is_looked_for(tmp_path, name):
    with pytest.raises(DataError, match="ROOT/"):
        load_training(name, tmp_path)
    with pytest.raises(DataError, match=r"does not exist.*ROOT/"):
        load_training(name, tmp_path / "no")


def test_unknown_training_set_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'got10k"):
        load_training("got-10k", ".")


@pytest.mark.data
def test_real_tracks_lie_inside_their_images(tracking_data):
    for track in load_training("lasot", tracking_data):
        assert track.exists.all()
        assert (track.boxes[:, :2] >= 0).all()
        assert (track.boxes[:, :2] + track.boxes[:, 2:] <= 360).all()
