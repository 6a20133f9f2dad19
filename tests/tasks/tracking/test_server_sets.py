"""GOT-10k and TrackingNet: sets whose test boxes stay on a server."""

import numpy as np
import pytest

from tasks.tracking.sequences import got10k
from tasks.tracking.sequences.catalogue import find_sequences, load_benchmark
from tests.tasks.tracking.layouts import moving, write_frames, write_got10k, write_trackingnet
from visionlora.errors import DataError


def test_got10k_validation_knows_which_frames_show_the_object(tmp_path):
    boxes = write_got10k(tmp_path / "val" / "GOT-10k_Val_000001")
    (sequence,) = load_benchmark("got10k_val", tmp_path)
    np.testing.assert_array_equal(sequence.boxes, boxes)
    assert sequence.absent.tolist() == [False, False, False, True, False]
    assert load_benchmark("got10k_val", tmp_path / "val")[0].frames[0].name == "00000001.jpg"
    (tmp_path / "val" / "GOT-10k_Val_000001" / "cover.label").write_text("8\n0\n3\n0\n8\n")
    (sequence,) = load_benchmark("got10k_val", tmp_path)
    assert sequence.absent.tolist() == [False, True, False, True, False]
    (tmp_path / "val" / "GOT-10k_Val_000001" / "cover.label").write_text("8\n0\n")
    with pytest.raises(DataError, match=r"cover.label has 2 lines for 5 boxes"):
        load_benchmark("got10k_val", tmp_path)


def test_got10k_test_has_all_frames_and_one_box(tmp_path):
    write_got10k(tmp_path / "test" / "GOT-10k_Test_000002", count=6, first_only=True)
    (sequence,) = load_benchmark("got10k", tmp_path)
    assert (len(sequence), sequence.boxes.tolist()) == (6, [[4, 5, 10, 8]])
    (tmp_path / "test" / "GOT-10k_Test_000002" / "00000004.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 5 frames are missing .*00000004.jpg"):
        load_benchmark("got10k", tmp_path)


def test_got10k_list_says_what_has_to_be_there(tmp_path):
    for number in (1, 2):
        write_got10k(tmp_path / "val" / f"GOT-10k_Val_00000{number}")
    (tmp_path / "val" / "list.txt").write_text(
        "GOT-10k_Val_000002\nGOT-10k_Val_000003"  # the last name without a line end
    )
    with pytest.raises(DataError, match=r"'GOT-10k_Val_000003'.* of 2 not found"):
        load_benchmark("got10k_val", tmp_path)
    selection = find_sequences("got10k_val", tmp_path, skip_missing=True)
    assert list(selection.present) == ["GOT-10k_Val_000002"]
    assert selection.missing == ("GOT-10k_Val_000003",)


def test_got10k_list_holds_names_not_paths(tmp_path):
    write_got10k(tmp_path / "val" / "GOT-10k_Val_000001")
    (tmp_path / "val" / "list.txt").write_text("../val/GOT-10k_Val_000001\n")
    with pytest.raises(DataError, match="is not the name of a folder"):
        load_benchmark("got10k_val", tmp_path)


def test_vot_safe_list_is_7086_of_9335_places():
    names = tuple(f"GOT-10k_Train_{i:06d}" for i in range(1, 9336))
    chosen = got10k.vot_safe(names)
    assert len(set(chosen)) == len(chosen) == 7086
    assert chosen[0] == "GOT-10k_Train_000001"
    assert "GOT-10k_Train_000005" not in chosen
    with pytest.raises(DataError, match=r"all 9335 of train/list.txt, and 9334 are listed"):
        got10k.vot_safe(names[:-1])


def test_trackingnet_counts_frames_from_zero(tmp_path):
    write_trackingnet(tmp_path / "TEST", "abc_0", count=12)
    for root in (tmp_path, tmp_path / "TEST"):
        (sequence,) = load_benchmark("trackingnet", root)
        assert [path.stem for path in sequence.frames] == [str(i) for i in range(12)]
        np.testing.assert_array_equal(sequence.boxes, moving(1))
    (tmp_path / "TEST" / "frames" / "abc_0" / "7.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 11 frames are missing .*: 7.jpg"):
        load_benchmark("trackingnet", tmp_path)


def test_trackingnet_without_frames_says_where_they_belong(tmp_path):
    write_trackingnet(tmp_path / "TEST", "abc_0", count=2)
    write_frames(tmp_path / "TEST" / "frames" / "other", ("0.jpg",))
    (tmp_path / "TEST" / "frames" / "abc_0").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no frames in .*TEST/frames/abc_0"):
        load_benchmark("trackingnet", tmp_path)
