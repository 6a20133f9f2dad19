"""The tracker around the network: crops, state, and what it refuses."""

import numpy as np
import pytest
import torch

from tasks.tracking.boxes import iou, xywh_to_xyxy
from tasks.tracking.geometry.raster import cells
from tasks.tracking.images import MEAN, STD
from tasks.tracking.model.lorat import Prediction
from tasks.tracking.trackers.catalogue import (
    TrackerConfig,
    load_tracker,
    parameter_counts,
    tracker_names,
)
from tasks.tracking.trackers.lorat import LoRATTracker
from tests.tasks.tracking.oracle import SHAPE, OracleModel, path_of, picture
from visionlora.errors import AdapterStateError, ConfigError, DataError, DivergedError

BOX = (60.0, 45.0, 24.0, 20.0)


def overlaps(a, b):
    return iou(xywh_to_xyxy(a), xywh_to_xyxy(b))


def test_perfect_predictions_track_within_one_percent():
    boxes = path_of(12)
    tracker = LoRATTracker(OracleModel())
    tracker.init(picture(boxes[0]), boxes[0])
    found = [tracker.track(picture(box)) for box in boxes[1:]]
    assert overlaps([output.box for output in found], boxes[1:]).min() > 0.99
    sure = float(torch.tensor(8.0).sigmoid())
    assert [output.score for output in found] == pytest.approx([sure] * 11)


def test_template_shows_the_object_in_its_middle_and_the_mask_covers_it():
    model = OracleModel()
    LoRATTracker(model).init(picture(BOX), BOX)
    red = model.templates[0][0, 0] * STD[0] + MEAN[0]
    share = torch.nn.functional.avg_pool2d(red[None], SHAPE.patch)[0]
    assert model.masks[0].dtype == torch.int64
    assert torch.equal(model.masks[0][0].bool(), share > 0.02)


def test_crops_are_filled_with_the_mean_of_the_first_frame():
    model = OracleModel()
    tracker = LoRATTracker(model)
    corner = (2.0, 2.0, 24.0, 20.0)
    first, bright = picture(corner, blue=60), picture(corner, blue=200)
    tracker.init(first, corner)
    tracker.track(bright)
    outside = model.searches[0][0, :, 0, 0] * torch.tensor(STD) + torch.tensor(MEAN)
    mean = torch.from_numpy(first.reshape(-1, 3).mean(0) / 255).float()
    torch.testing.assert_close(outside, mean, atol=1e-6, rtol=0)


def test_small_objects_are_searched_as_if_they_had_ten_pixels():
    model = OracleModel()
    for box in ((70.0, 50.0, 4.0, 2.0), (67.0, 46.0, 10.0, 10.0)):
        tracker = LoRATTracker(model)
        tracker.init(picture(BOX), box)
        tracker.track(picture(BOX))
    assert torch.equal(*model.searches)


class Elsewhere(OracleModel):
    """An oracle that once points far outside the frame."""

    lost = False

    def locate(self, remembered, search):
        found = super().locate(remembered, search)
        return found._replace(boxes=found.boxes - 50) if self.lost else found


def test_a_box_outside_the_frame_keeps_the_state():
    model = Elsewhere()
    tracker = LoRATTracker(model)
    slot = tracker.start(picture(BOX), BOX)
    model.lost = True
    (output,) = tracker.advance([slot], [picture(BOX)])
    assert output.box[2] * output.box[3] == 0
    assert slot.box.tolist() == [60, 45, 84, 65]
    model.lost = False
    (output,) = tracker.advance([slot], [picture(BOX)])
    assert overlaps(output.box, BOX) > 0.99


def test_boxes_are_clipped_to_the_frame():
    moved = (-4.0, 30.0, 24.0, 20.0)
    tracker = LoRATTracker(OracleModel())
    tracker.init(picture((0, 30, 20, 20)), (0, 30, 20, 20))
    found = tracker.track(picture(moved)).box
    assert found[0] >= 0
    assert overlaps(found, (0, 30, 20, 20)) > 0.9


class Overflowing(OracleModel):
    def locate(self, remembered, search):
        score, boxes = super().locate(remembered, search)
        return Prediction(score * float("nan"), boxes)


def test_predictions_that_are_not_finite_are_an_error():
    tracker = LoRATTracker(Overflowing())
    tracker.init(picture(BOX), BOX)
    with pytest.raises(DivergedError, match="not finite"):
        tracker.track(picture(BOX))


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((10, 10, 0, 5), "no size: w 0, h 5"),
        ((10, 10, 5, -2), "no size"),
        ((160, 10, 5, 5), "lies outside the image of 160 x 120 pixels"),
        ((-9, 10, 9, 5), "lies outside"),
        ((1, 2, 3), "four finite numbers"),
        ((1, 2, float("nan"), 4), "four finite numbers"),
        ("1,2,3,4", "four"),
    ],
)
def test_boxes_without_an_object_are_refused(box, says):
    with pytest.raises(DataError, match=says):
        LoRATTracker(OracleModel()).init(picture(BOX), box)


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (torch.zeros(3, 120, 160), r"shape \(3, 120, 160\) and torch.float32"),
        (np.zeros((120, 160, 3)), "float64"),
        (np.zeros((120, 160), np.uint8), r"shape \(120, 160\)"),
        ("frame.jpg", "str"),
    ],
)
@pytest.mark.parametrize("name", ["static", "ncc", "oracle"])
def test_what_is_no_frame_is_refused(name, image, given):
    tracker = LoRATTracker(OracleModel()) if name == "oracle" else load_tracker(name)
    with pytest.raises(DataError, match=f"RGB array .* of uint8; got .*{given}"):
        tracker.init(image, BOX)


def test_track_before_init_is_refused():
    with pytest.raises(AdapterStateError, match="init"):
        LoRATTracker(OracleModel()).track(picture(BOX))


def test_a_second_init_starts_over():
    tracker = LoRATTracker(OracleModel())
    tracker.init(picture(BOX), BOX)
    tracker.init(picture((20, 20, 20, 20)), (20, 20, 20, 20))
    assert overlaps(tracker.track(picture((22, 21, 20, 20))).box, (22, 21, 20, 20)) > 0.99


def test_unknown_trackers_are_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'lorat-b-224'"):
        load_tracker("lorat-b224")


def test_weights_are_asked_for_where_there_are_none():
    with pytest.raises(ConfigError, match="lorat-s-224 needs --weights"):
        load_tracker("lorat-s-224")
    with pytest.raises(ConfigError, match="takes no weights"):
        load_tracker("static", weights="a.bin")


@pytest.mark.parametrize("option", [{"device": "cuda"}, {"precision": "bf16"}])
def test_baselines_refuse_what_they_would_ignore(option):
    with pytest.raises(ConfigError, match="'ncc' runs on the cpu in fp32, not"):
        load_tracker("ncc", **option)


def test_files_of_something_else_are_refused_without_advice_to_run_them(tmp_path):
    (tmp_path / "notes.bin").write_text("no tensors")
    with pytest.raises(DataError, match=r"no file of tensors$"):
        load_tracker("lorat-s-224", weights=tmp_path / "notes.bin")
    with pytest.raises(DataError, match="no weights file at"):
        load_tracker("lorat-s-224", weights=tmp_path / "base.bin")


def test_half_precision_needs_an_accelerator():
    config = TrackerConfig(tracker="tiny", device="cpu", precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs"):
        config.load()


def test_the_tracker_that_ships_follows_an_object():
    boxes = np.array(BOX) + np.outer(np.arange(8), [5.0, 2.0, 0.0, 0.0])
    assert overlaps(boxes[:1], boxes[-1:]).item() == 0  # it does not stay where it was
    tracker = load_tracker("tiny", device="cpu")
    tracker.init(picture(boxes[0]), boxes[0])
    found = [tracker.track(picture(box)).box for box in boxes[1:]]
    assert overlaps(found, boxes[1:]).min() > 0.5


def test_all_trackers_of_the_command_line_are_there():
    assert {"tiny", "lorat-b-224", "lorat-g-378", "static", "ncc", "lite0"} <= set(tracker_names())


def test_a_tracker_without_a_network_has_no_parameters():
    class Nothing:
        name = "nothing"

    assert parameter_counts(Nothing()) == (0, 0)


def test_masks_of_elongated_boxes_touch_every_cell_they_meet():
    box = np.array([10.0, 40, 60, 12])
    model = OracleModel()
    LoRATTracker(model).init(picture(box), box)
    mask = model.masks[0][0].bool().numpy()
    assert mask.sum() == cells([0, 20, 56, 36], 56, 4).sum()
