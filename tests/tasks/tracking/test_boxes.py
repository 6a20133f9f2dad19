"""Overlap of boxes: known values, symmetries, and that numpy and torch agree."""

import numpy as np
import pytest
import torch

from tasks.tracking.boxes import clip, iou, overlap, xywh_to_xyxy, xyxy_to_xywh
from tests.tolerances import assert_close


@pytest.fixture
def some() -> tuple[np.ndarray, np.ndarray]:
    """Two hundred pairs of boxes, about half of them overlapping."""
    generator = np.random.default_rng(0)
    corners, sizes = generator.uniform(0, 50, (2, 200, 2)), generator.uniform(1, 60, (2, 200, 2))
    a, b = np.concatenate([corners, corners + sizes], axis=-1)
    return a, b


def test_sizes_and_corners_are_inverse(some):
    np.testing.assert_allclose(xywh_to_xyxy(xyxy_to_xywh(some[0])), some[0])
    assert xywh_to_xyxy([1, 2, 3, 4]).tolist() == [1, 2, 4, 6]


def test_known_overlaps():
    box = [0, 0, 4, 2]
    others = [[0, 0, 4, 2], [2, 0, 6, 2], [1, 0, 3, 1], [4, 0, 8, 2], [9, 9, 10, 10]]
    assert iou(box, others).tolist() == [1.0, 4 / 12, 2 / 8, 0.0, 0.0]


def test_boxes_without_area_do_not_overlap():
    assert iou([3, 3, 3, 3], [[3, 3, 3, 3], [0, 0, 9, 9]]).tolist() == [0.0, 0.0]


def test_what_is_outside_is_cut_off():
    assert clip([-3, 4, 70, 80], 50, 40).tolist() == [0, 4, 50, 40]
    outside = clip([60, -9, 70, -5], 50, 40)
    assert outside.tolist() == [50, 0, 50, 0]


def test_overlap_in_torch_is_the_measured_one(some):
    ratio, _ = overlap(*map(torch.from_numpy, some))
    assert_close(ratio, torch.from_numpy(iou(*some)))
    assert 0.2 < float((ratio > 0).double().mean()) < 0.8


def test_generalised_overlap_falls_with_the_gap():
    box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    gaps = torch.tensor([0.0, 1.0, 2.0, 8.0])
    apart = box + torch.stack([1 + gaps, 0 * gaps, 1 + gaps, 0 * gaps], dim=1)
    ratio, generalised = overlap(box, apart)
    assert_close(ratio, torch.zeros(4))
    assert_close(generalised, -gaps / (gaps + 2))  # the share of the hull that neither box fills


def test_generalised_overlap_is_symmetric_and_bounded(some):
    a, b = map(torch.from_numpy, some)
    ratio, generalised = overlap(a, b)
    assert_close(overlap(b, a)[1], generalised)
    assert bool((generalised <= ratio).all())
    assert float(generalised.min()) > -1
    assert_close(overlap(a, a)[1], torch.ones(len(a), dtype=a.dtype))


def test_overlap_has_the_gradient_of_its_value(some):
    a, b = (torch.from_numpy(part[:12] / 50).requires_grad_() for part in some)
    assert torch.autograd.gradcheck(overlap, (a, b))


def test_gradient_of_equal_points_is_finite():
    point = torch.zeros(1, 4, requires_grad=True)
    sum(part.sum() for part in overlap(point, torch.zeros(1, 4))).backward()
    assert bool(point.grad.isfinite().all())
