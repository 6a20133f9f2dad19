"""Trackers without training: what they find, and what they refuse."""

import numpy as np
import pytest
import torch

from tasks.tracking.boxes import iou, xywh_to_xyxy
from tasks.tracking.trackers.correlation import Correlation
from tasks.tracking.trackers.features import FeatureCorrelation, similarity
from tasks.tracking.trackers.static import Static
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, DataError

BOX = (60.0, 40.0, 30.0, 20.0)


@pytest.fixture(scope="module")
def scene():
    """A frame of noise, smooth enough that neighbouring cells are alike."""
    noise = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(3))
    frame = torch.nn.functional.interpolate(noise, (120, 160), mode="bicubic")[0].clamp(0, 1)
    return (frame.permute(1, 2, 0) * 255).byte().numpy()


def blocks(pixels):
    """Features that need no network: the 4 x 4 pixels of every cell, without their mean."""
    cells = torch.nn.functional.adaptive_avg_pool2d(
        pixels, tuple(4 * n // 16 for n in pixels.shape[2:])
    )
    features = torch.nn.functional.pixel_unshuffle(cells, 4)
    return (features - features.mean(1, keepdim=True)).flatten(2).transpose(1, 2)


def moved(frame, right, down):
    return np.roll(frame, (down, right), axis=(0, 1))


def trackers():
    return [Static(), Correlation(), FeatureCorrelation(blocks, "blocks")]


@pytest.mark.parametrize("tracker", trackers(), ids=lambda tracker: tracker.name)
def test_an_unmoved_object_stays_where_it_is(tracker, scene):
    tracker.init(scene, BOX)
    found = tracker.track(scene)
    assert iou(xywh_to_xyxy(found.box), xywh_to_xyxy(BOX)) > 0.9
    assert found.score > 0.99


def test_static_never_moves(scene):
    tracker = Static()
    tracker.init(scene, BOX)
    np.testing.assert_allclose(tracker.track(moved(scene, 9, 5)).box, np.array(BOX))


def test_correlation_finds_the_exact_displacement(scene):
    tracker = Correlation()
    tracker.init(scene, BOX)
    for step in (1, 2, 3):
        found = tracker.track(moved(scene, 7 * step, -5 * step))
        expected = np.array([BOX[0] + 7 * step, BOX[1] - 5 * step, BOX[2], BOX[3]])
        np.testing.assert_allclose(found.box, expected)


def test_correlation_does_not_mind_the_light(scene):
    tracker = Correlation()
    tracker.init(scene, BOX)
    found = tracker.track((moved(scene, 6, 4) * 0.5 + 40).astype(np.uint8))
    np.testing.assert_allclose(found.box[:2], np.array([66.0, 44.0]))


def test_correlation_prefers_the_near_one_of_two_equal_places():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[40:50, 90:100] = 255
    tracker = Correlation()
    tracker.init(frame, (86.0, 36.0, 18.0, 18.0))
    both = np.zeros_like(frame)
    both[40:50, 94:104] = both[40:50, 70:80] = 255
    np.testing.assert_allclose(tracker.track(both).box[0], 90.0)


@pytest.mark.parametrize(("right", "down"), [(8, 0), (0, -6), (-10, 5)])
def test_features_find_the_displacement(right, down, scene):
    tracker = FeatureCorrelation(blocks)
    tracker.init(scene, BOX)
    found = tracker.track(moved(scene, right, down)).box
    centre = found[:2] + found[2:] / 2
    expected = np.array([BOX[0] + 15 + right, BOX[1] + 10 + down])
    assert np.abs(centre - expected).max() < 2.0


@pytest.mark.parametrize(("factor", "least", "most"), [(1.15, 1.04, 1.25), (0.87, 0.75, 0.96)])
def test_features_follow_an_object_that_grows_or_shrinks(factor, least, most, scene):
    tracker = FeatureCorrelation(blocks)
    tracker.init(scene, BOX)
    frame = torch.from_numpy(scene.copy()).permute(2, 0, 1)[None].float()
    # Enlarged about the object's centre (75, 50), which is not that of the frame.
    theta = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]])
    theta[0, :, 2] = torch.tensor([75 / 80 - 1, 50 / 60 - 1]) * (1 - 1 / factor)
    grid = torch.nn.functional.affine_grid(theta, list(frame.shape), align_corners=False)
    other = torch.nn.functional.grid_sample(frame, grid, align_corners=False)[0]
    for _ in range(5):
        found = tracker.track(other.permute(1, 2, 0).byte().numpy()).box
    assert least < found[2] / BOX[2] < most
    assert found[2] / found[3] == pytest.approx(BOX[2] / BOX[3])


def test_similarity_is_the_mean_cosine_of_cells():
    generator = torch.Generator().manual_seed(0)
    search = torch.randn(2, 5, 7, 6, generator=generator)
    stamp = torch.randn(1, 5, 3, 2, generator=generator)
    found = similarity(search, stamp)
    assert found.shape == (2, 1, 5, 5)
    window = search[1, :, 2:5, 3:5]
    assert_close(found[1, 0, 2, 3], torch.cosine_similarity(window, stamp[0], dim=0).mean())


def test_stamp_has_the_cells_whose_centre_is_in_the_box(scene):
    tracker = FeatureCorrelation(blocks)
    # Area factor 2 of a 40 x 20 box: sides of 70 x 50 px, so 128 px for sqrt(70 * 50) = 59.2 px and
    # the object is 86.5 x 43.3 px about the middle: centres from 24 to 104 and from 56 to 72 px.
    tracker.init(scene, (50.0, 40.0, 40.0, 20.0))
    assert tracker._state.stamp.shape == (1, 48, 2, 6)
    tracker.init(scene, (50.0, 40.0, 60.0, 4.0))
    assert tracker._state.stamp.shape[2] == 1


@pytest.mark.parametrize("tracker", trackers(), ids=lambda tracker: tracker.name)
def test_bad_boxes_are_refused(tracker, scene):
    with pytest.raises(DataError, match="no size"):
        tracker.init(scene, (10, 10, 0, 5))
    with pytest.raises(DataError, match="outside"):
        tracker.init(scene, (500, 10, 5, 5))


@pytest.mark.parametrize("kind", [Static, Correlation, lambda: FeatureCorrelation(blocks)])
def test_track_before_init_is_refused(kind, scene):
    with pytest.raises(AdapterStateError, match="before track"):
        kind().track(scene)


@pytest.mark.parametrize("tracker", trackers(), ids=lambda tracker: tracker.name)
def test_an_object_at_the_border_and_out_of_it(tracker, scene):
    tracker.init(scene, (150.0, 110.0, 30.0, 25.0))
    for step in range(4):
        box = tracker.track(moved(scene, 30 * step, 30 * step)).box
        assert np.isfinite(box).all()


@pytest.mark.data
def test_static_box_scores_what_was_measured(tracking_data):
    scores = []
    for name in ("Crossing", "DragonBaby", "bag", "Human7", "Car1", "Skiing"):
        truth = np.loadtxt(tracking_data / name / "groundtruth.txt", delimiter=",")
        tracker = Static()
        tracker.init(np.zeros((400, 400, 3), np.uint8), truth[0])
        kept = np.stack([tracker.track(np.zeros((400, 400, 3), np.uint8)).box] * len(truth))
        overlaps = iou(xywh_to_xyxy(kept), xywh_to_xyxy(truth))
        scores.append(np.mean([(overlaps > t).mean() for t in np.linspace(0, 1, 21)]))
    assert 100 * np.mean(scores) == pytest.approx(19.6, abs=0.05)
