"""The choice of one box, and the box that is kept: window, confidence, a target that is lost."""

import numpy as np
import pytest
import torch

from tasks.tracking.boxes import iou
from tasks.tracking.geometry.crop import channel_mean, crop, crop_mapping, widen
from tasks.tracking.geometry.post import hann, next_state, select
from tasks.tracking.geometry.raster import cells
from tests.tolerances import assert_close


@pytest.mark.data
def test_choice_equals_the_official_one(lorat_ops):
    score = torch.from_numpy(lorat_ops["post.score_map"])
    boxes = torch.from_numpy(lorat_ops["loss.boxes"])
    box, confidence = select(score, boxes)
    assert_close(box * 224, torch.from_numpy(lorat_ops["post.box"]))
    assert_close(confidence, torch.from_numpy(lorat_ops["post.confidence"]))
    assert_close(hann(16, 16).flatten(), torch.from_numpy(lorat_ops["post.window"]))


def maps(peaks: dict[tuple[int, int], float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores with these probabilities and boxes that name their cell."""
    score = torch.full((1, 9, 9), -20.0)
    for cell, probability in peaks.items():
        score[(0, *cell)] = torch.logit(torch.tensor(probability), eps=1e-7)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    return score, torch.stack([columns, rows, columns + 1, rows + 1], dim=-1)[None]


def test_certain_distractor_at_the_border_loses_to_the_centre():
    peaks = {(0, 8): 1.0, (4, 4): 0.3}  # .55 against .55 * .3 + .45
    box, confidence = select(*maps(peaks))
    assert box[0].tolist() == [4, 4, 5, 5]
    assert_close(confidence, torch.tensor([0.3]))  # without the penalty
    box, confidence = select(*maps(peaks), window=0.0)
    assert box[0].tolist() == [8, 0, 9, 1]
    assert_close(confidence, torch.tensor([1.0]))


def test_window_is_weighed_against_the_score():
    # At the centre the window adds .45, at the border nothing: the difference of scores decides.
    for centre, chosen in ((0.1, 4), (0.9 - 0.45 / 0.55 - 0.01, 0)):
        box, _ = select(*maps({(0, 0): 0.9, (4, 4): centre}))
        assert box[0, 0] == chosen


def test_window_is_nothing_at_the_border_and_one_in_the_middle():
    window = hann(9, 5)
    assert window.shape == (9, 5)
    assert_close(window[4, 2], torch.tensor(1.0))
    border = window.clone()
    border[1:-1, 1:-1] = 0
    assert_close(border, torch.zeros(9, 5))


def test_every_map_of_a_batch_is_chosen_alone():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(4, 6, 6, generator=generator) * 3
    boxes = torch.rand(4, 6, 6, 4, generator=generator)
    together = select(score, boxes)
    for index in range(4):
        alone = select(score[index : index + 1], boxes[index : index + 1])
        assert torch.equal(alone[0][0], together[0][index])
        assert torch.equal(alone[1][0], together[1][index])


@pytest.mark.parametrize(
    "lost",
    [
        [500, 10, 520, 30],
        [10, -30, 40, -5],
        [-20, 10, 0, 30],
        [30, 10, 30, 40],
        [40, 10, 30, 40],
        [np.nan, 10, 30, 40],
    ],
)
def test_lost_target_leaves_no_state(lost):
    assert next_state(lost, (360, 240)) is None


def test_state_is_the_part_inside_the_frame():
    assert next_state([-20, 200, 30, 260], (360, 240)).tolist() == [0, 200, 30, 240]


@pytest.mark.parametrize(("factor", "crop_px", "grid"), [(4, 224, 16), (5, 378, 27)])
def test_perfect_model_follows_an_object(factor, crop_px, grid):
    """Score and box of a model that is always right, through crop, choice and the way back."""
    frame = torch.zeros(3, 180, 240)
    step = np.arange(40)
    centre = np.stack([40 + 4.3 * step, 90 + 75 * np.sin(step / 4)], axis=1)
    half = np.stack([12 + 0.2 * step, 9 + 4 * np.cos(step / 5)], axis=1)
    truth = np.concatenate([centre - half, centre + half], axis=1)
    state = next_state(truth[0], (240, 180))
    for box in truth[1:]:
        visible = next_state(box, (240, 180))
        mapping = crop_mapping(widen(state), crop_px, factor)
        _, mapping = crop(frame, mapping, crop_px, channel_mean(frame))
        there = mapping.apply(visible)
        score = torch.where(torch.from_numpy(cells(there, crop_px, grid)), 9.0, -9.0)[None]
        boxes = torch.from_numpy(there / crop_px).float().expand(1, grid, grid, 4)
        found, _ = select(score, boxes)
        state = next_state(mapping.invert(found[0].double().numpy() * crop_px), (240, 180))
        assert iou(state, visible) > 0.99
