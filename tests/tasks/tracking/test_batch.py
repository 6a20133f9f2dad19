"""Several objects in one batch give what each gives alone."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import visionlora as vl
from tasks.tracking.model import LoRAT, TrackerShape, add_adapter
from tasks.tracking.runner import track_all
from tasks.tracking.trackers.catalogue import merge_away
from tasks.tracking.trackers.lorat import LoRATTracker
from tests.tasks.tracking.oracle import path_of, picture, sequence
from visionlora.record import hosts_of

LENGTHS = (5, 2, 7, 1, 4)


def small_model(method="lorat"):
    vit = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
    )
    model = LoRAT(vit, TrackerShape(template_px=28, search_px=56))
    add_adapter(model, method, rank=2)
    with torch.no_grad():  # boxes of a small object instead of half the crop
        model.head.reg_mlp.layers[-1].bias.fill_(-2.0)
    return model.eval()


@pytest.fixture(scope="module")
def tracker():
    torch.default_generator.manual_seed(0)
    return LoRATTracker(small_model())


def test_boxes_do_not_depend_on_the_batch_size(tracker, tmp_path):
    videos = [sequence(tmp_path, f"v{i}", n, seed=i) for i, n in enumerate(LENGTHS)]
    found = {}
    for batch in (1, 2, 3, 8):
        runs = list(track_all(tracker, videos, batch=batch, ahead=batch == 3))
        assert sorted(run.sequence.name for run in runs) == [video.name for video in videos]
        found[batch] = {run.sequence.name: run.boxes for run in runs}
    for video in videos:
        assert found[1][video.name].shape == (len(video), 4)
        for batch in (2, 3, 8):
            np.testing.assert_allclose(
                found[batch][video.name], found[1][video.name], atol=1e-3, rtol=0
            )


def test_the_runner_gives_what_init_and_track_give(tracker, tmp_path):
    video = sequence(tmp_path, "alone", 5, seed=9)
    (run,) = track_all(tracker, [video], batch=4)
    boxes = path_of(5, seed=9)
    tracker.init(picture(boxes[0]), boxes[0])
    alone = [boxes[0], *(tracker.track(picture(box)).box for box in boxes[1:])]
    np.testing.assert_array_equal(run.boxes, alone)


def test_merged_adapters_track_like_unmerged_ones(tracker, tmp_path):
    video = sequence(tmp_path, "merged", 4)
    (before,) = track_all(tracker, [video])
    with vl.merged(tracker.model):
        (after,) = track_all(tracker, [video])
    np.testing.assert_allclose(after.boxes, before.boxes, atol=1e-3, rtol=0)
    assert len(np.unique(before.boxes[1:], axis=0)) == 3  # it does not stand still


def test_adapters_leave_no_cost_behind(tmp_path):
    video = sequence(tmp_path, "plain", 3)
    tracker = LoRATTracker(small_model())
    (before,) = track_all(tracker, [video])
    merge_away(tracker.model)
    (after,) = track_all(tracker, [video])
    np.testing.assert_allclose(after.boxes, before.boxes, atol=1e-3, rtol=0)
    assert not hosts_of(tracker.model)
    kept = sum(p.numel() for p in tracker.model.parameters())
    # two blocks of width 24 and rank 2: 18 r d each
    assert tracker.counts.total - kept == 2 * 18 * 2 * 24


def test_methods_that_route_by_input_stay(tmp_path):
    model = small_model(method="moe-lora")
    count = len(hosts_of(model))
    merge_away(model)
    assert len(hosts_of(model)) == count > 0
