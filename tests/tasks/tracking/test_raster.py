"""Cells of a box: every one that it touches, never none."""

import numpy as np
import pytest

from tasks.tracking.geometry.raster import TOLERANCE, cells, rasterise


@pytest.fixture
def boxes() -> np.ndarray:
    """Boxes of 1 to 120 px on a crop of 224 px, some reaching over its border."""
    generator = np.random.default_rng(0)
    corner, size = generator.uniform(-20, 200, (300, 2)), generator.uniform(1, 120, (300, 2))
    boxes = np.concatenate([corner, corner + size], axis=1)
    return boxes[(boxes[:, 2:] > 1).all(axis=1)]


@pytest.mark.data
@pytest.mark.parametrize("index", range(5))
def test_positive_cells_equal_the_official_ones(lorat_ops, index):
    found = cells(lorat_ops["label.boxes_xyxy_px"][index], 224, 16)
    np.testing.assert_array_equal(np.flatnonzero(found), lorat_ops[f"label.idx224_{index}"])


def test_cells_are_those_that_a_box_touches(boxes):
    borders = np.arange(17) * 14.0
    start, end = borders[:-1], borders[1:]

    def touched(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (low[:, None] < end) & (high[:, None] > start + TOLERANCE * 14)

    expected = (
        touched(boxes[:, 1], boxes[:, 3])[:, :, None]
        & (touched(boxes[:, 0], boxes[:, 2])[:, None, :])
    )
    np.testing.assert_array_equal(cells(boxes, 224, 16), expected)


def test_many_boxes_at_once_are_each_alone(boxes):
    together = cells(boxes[:12].reshape(3, 4, 4), 112, 8)
    assert together.shape == (3, 4, 8, 8)
    np.testing.assert_array_equal(together[1, 2], cells(boxes[6], 112, 8))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([15, 15, 16, 16], [(1, 1)]),
        ([13.5, 15, 14.5, 16], [(1, 0), (1, 1)]),
        ([13.5, 27.5, 14.5, 28.5], [(1, 0), (1, 1), (2, 0), (2, 1)]),
        ([14, 14, 28, 28], [(1, 1)]),
        ([223, 223, 224, 224], [(15, 15)]),
    ],
)
def test_box_of_one_pixel_has_the_cells_it_touches(box, expected):
    assert [tuple(cell) for cell in np.argwhere(cells(box, 224, 16))] == expected


@pytest.mark.parametrize(
    "box",
    [
        [70.00001, 30, 70.00003, 31],
        [50, 50, 50, 50],
        [224, 224, 224, 224],
        [300, 30, 310, 40],
        [30, -30, 40, -20],
    ],
)
def test_thin_or_outer_box_has_the_one_cell_nearest_to_it(box):
    found = np.argwhere(cells(box, 224, 16))
    nearest = np.clip(np.array([box[1], box[0]]) // 14, 0, 15)
    assert nearest.tolist() in found.tolist()
    assert len(found) == 1


def test_rounding_past_a_border_adds_no_cell():
    assert rasterise([1.0, 2.0, 3.00005, 4.0]).tolist() == [1, 2, 3, 4]
    assert rasterise([1.0, 2.0, 3.0002, 4.0]).tolist() == [1, 2, 4, 4]


def test_flipped_box_has_the_flipped_cells(boxes):
    flipped = np.stack([224 - boxes[:, 2], boxes[:, 1], 224 - boxes[:, 0], boxes[:, 3]], axis=1)
    np.testing.assert_array_equal(cells(flipped, 224, 16), cells(boxes, 224, 16)[:, :, ::-1])


def test_rows_are_y():
    found = cells([0, 100, 224, 110], 224, 16)
    assert found.all(axis=1).nonzero()[0].tolist() == [7]
