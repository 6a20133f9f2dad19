"""Pairs cut from photographs: their boxes, their shapes, and what they are cut from."""

import numpy as np
import pytest
from PIL import Image

from tasks.tracking.boxes import iou
from tasks.tracking.training import photographs
from tasks.tracking.training.paste import Look, Thing, bent, draw_outline, hull, paste, pose
from tasks.tracking.training.photographs import Photographs
from tasks.tracking.training.synthetic import ASPECT, SEARCH_SIDE, TEMPLATE_SIDE, SyntheticPairs
from visionlora.errors import DataError

UNIT = 24.0


def write_photos(folder, sizes=((300, 220), (260, 400))):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def pairs(tmp_path):
    return SyntheticPairs(Photographs(write_photos(tmp_path / "photos")), UNIT)


def test_a_pair_depends_on_the_generator_alone(pairs):
    first = [pairs.pair(np.random.default_rng((0, n))) for n in range(3)]
    again = [pairs.pair(np.random.default_rng((0, n))) for n in reversed(range(3))][::-1]
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.box, b.box)
    assert not np.array_equal(first[0].search.image, first[1].search.image)


def test_boxes_lie_in_their_frames_and_are_about_as_large_as_objects_in_crops(pairs):
    sides = []
    for number in range(30):
        pair = pairs.pair(np.random.default_rng(number))
        for view, side in zip(pair, (TEMPLATE_SIDE, SEARCH_SIDE), strict=True):
            assert view.image.shape == (round(side * UNIT), round(side * UNIT), 3)
            assert view.image.dtype == np.uint8
            size = view.box[2:] - view.box[:2]
            assert (view.box >= 0).all()
            assert (view.box <= side * UNIT).all()
            assert (size > 5).all()
            sides.append(np.sqrt(size.prod()))
    assert 0.8 < np.exp(np.mean(np.log(np.array(sides) / UNIT))) < 1.25


def test_objects_stand_and_lie_as_those_that_people_draw_boxes_around(pairs):
    sizes = np.array([pairs._size(np.random.default_rng(number)) for number in range(400)])
    aspects = np.log(sizes[:, 0] / sizes[:, 1])
    np.testing.assert_allclose(aspects.std(), ASPECT, rtol=0.1)
    assert abs(aspects.mean()) < 0.1
    np.testing.assert_allclose(np.log(sizes / UNIT).mean(), 0, atol=0.03)


def test_the_object_moves_between_the_frames(pairs):
    offsets = []
    for number in range(30):
        pair = pairs.pair(np.random.default_rng(number))
        centres = [(view.box[:2] + view.box[2:]) / 2 for view in pair]
        offsets.append(centres[1] - centres[0])
    assert (np.std(offsets, axis=0) > 0.3 * UNIT).all()


def painted(frame):
    rows, columns = np.nonzero(frame[..., 0] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


@pytest.mark.parametrize("seed", range(6))
def test_the_box_of_a_pasted_shape_is_what_was_painted(seed):
    rng = np.random.default_rng(seed)
    outline = draw_outline(rng)
    np.testing.assert_allclose([outline.min(0), outline.max(0)], [[-0.5] * 2, [0.5] * 2])
    frame = np.zeros((100, 120, 3), np.uint8)
    thing = Thing(np.full((48, 48, 3), 255, np.uint8), bent(outline, rng))
    matrix = pose(np.array([50.0, 38.0]), np.array([61.3, 47.8]), rng.normal(0, 0.3), 0.1)
    paste(frame, thing, matrix)
    # Thin tips fade; the box is exact where the shape is blunt.
    assert iou(painted(frame), hull(thing.outline, matrix)) > 0.9


def test_a_pasted_square_is_where_its_box_says():
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    frame = np.zeros((60, 60, 3), np.uint8)
    matrix = pose(np.array([20.0, 30.0]), np.array([25.0, 30.0]))
    paste(frame, Thing(np.full((48, 48, 3), 255, np.uint8), square), matrix)
    np.testing.assert_array_equal(hull(square, matrix), [15, 15, 35, 45])
    np.testing.assert_array_equal(painted(frame), [15, 15, 35, 45])


def test_a_pasted_texture_keeps_its_sides():
    texture = np.zeros((48, 48, 3), np.uint8)
    texture[:, 24:] = 255
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    frame = np.zeros((60, 60, 3), np.uint8)
    paste(frame, Thing(texture, square), pose(np.array([20.0, 20.0]), np.array([30.0, 30.0])))
    np.testing.assert_array_equal(painted(frame), [30, 20, 40, 40])


@pytest.mark.parametrize("centre", [[-30.0, 20.0], [200.0, 20.0], [20.0, -30.0]])
def test_what_lies_outside_a_frame_paints_nothing(centre):
    frame = np.zeros((40, 40, 3), np.uint8)
    thing = Thing(np.full((48, 48, 3), 255, np.uint8), draw_outline(np.random.default_rng(0)))
    paste(frame, thing, pose(np.array([20.0, 20.0]), np.array(centre)))
    assert not frame.any()


@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_a_look_shows_things_where_its_matrix_says(angle):
    photo = np.zeros((90, 90, 3), np.uint8)
    photo[40:50, 50:60] = 255
    look = Look(photo, np.array([45.0, 45.0]), np.array([30.0, 28.0]), 1.5, angle)
    corners = np.array([[50, 40], [60, 40], [60, 50], [50, 50]], float)
    expected = hull(corners, look.matrix)
    np.testing.assert_allclose(painted(look.frame(64)), expected, atol=1.0)


def test_photographs_are_listed_with_what_is_left_out(tmp_path):
    folder = write_photos(tmp_path / "photos")
    (folder / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (300, 20)).save(folder / "strip.png")
    (folder / "notes.txt").write_text("not looked at")
    found = Photographs(folder)
    assert len(found) == 2
    assert found.notes[0].endswith("2 photographs")
    assert found.notes[1].startswith("2 files left out, first: ")
    assert "broken.jpg" in found.notes[1]


@pytest.mark.parametrize("broken", [False, True])
def test_a_folder_without_photographs_is_refused(tmp_path, broken):
    if broken:
        (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no usable photograph" + ("; first" * broken)):
        Photographs(tmp_path)


def test_photographs_are_shrunk_to_the_budget_and_halved(tmp_path, monkeypatch):
    folder = write_photos(tmp_path / "photos", ((600, 400),))
    shapes = [level.shape[:2] for level in Photographs(folder).pyramids[0]]
    assert shapes == [(400, 600), (200, 300)]
    monkeypatch.setattr(photographs, "BUDGET", 4 * 300 * 200)  # 3 channels, a third for levels
    assert [level.shape[:2] for level in Photographs(folder).pyramids[0]] == [(200, 300)]
