"""The losses: golden values and gradients, what is no target, and batches over processes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tasks.tracking.boxes import overlap
from tasks.tracking.geometry.raster import cells
from tasks.tracking.losses import tracking_loss
from tests.pair import run_pair
from tests.tolerances import assert_close

TRUTH = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.5], [0.0, 0.7, 0.1, 0.8]])


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random scores and boxes on a grid of 8, and the positive cells of the truth."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 8, 8, generator=generator)
    distances = torch.rand(3, 8, 8, 4, generator=generator) * 0.5
    at = (torch.arange(8) + 0.5) / 8
    place = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1)
    boxes = torch.cat([place - distances[..., :2], place + distances[..., 2:]], dim=-1)
    positive = torch.from_numpy(cells(TRUTH.numpy() * 64, 64, 8))
    return score.requires_grad_(), boxes.requires_grad_(), positive


@pytest.mark.data
def test_losses_and_gradients_equal_the_official_ones(lorat_ops):
    stored = {name: torch.from_numpy(value) for name, value in lorat_ops.items() if "loss" in name}
    score = stored["loss.score_map"].requires_grad_()
    boxes = stored["loss.boxes"].requires_grad_()
    positive = torch.zeros(3, 256, dtype=torch.bool)
    positive[stored["loss.batch_idx"], stored["loss.map_idx"]] = True
    found = tracking_loss((score, boxes), stored["loss.gt_boxes"], positive.view(3, 16, 16))
    assert_close(found.total[None], stored["loss.total"])
    assert_close(found.classification[None], stored["loss.cls"])
    assert_close(found.regression[None], stored["loss.giou"])
    found.total.backward()
    assert_close(score.grad * 1e2, stored["loss.grad_score_map"] * 1e2)
    assert_close(boxes.grad * 1e2, stored["loss.grad_boxes"] * 1e2)


def test_perfect_boxes_have_no_regression_loss():
    score, _, positive = batch()
    boxes = TRUTH[:, None, None].expand(3, 8, 8, 4)
    found = tracking_loss((score, boxes), TRUTH, positive)
    assert_close(found.regression, torch.tensor(0.0))
    assert_close(found.iou, torch.tensor(1.0))
    certain = torch.where(positive, 20.0, -20.0)
    assert_close(tracking_loss((certain, boxes), TRUTH, positive).total, torch.tensor(0.0))


def test_target_carries_no_gradient_to_the_boxes():
    score, boxes, positive = batch()
    classification = tracking_loss((score, boxes), TRUTH, positive).classification
    assert torch.autograd.grad(classification, boxes, allow_unused=True) == (None,)


def test_boxes_of_other_cells_are_free():
    score, boxes, positive = batch()
    tracking_loss((score, boxes), TRUTH, positive).total.backward()
    assert not bool(boxes.grad[~positive].any())
    assert bool(boxes.grad[positive].any(dim=-1).all())
    assert bool(score.grad.all())


def test_score_wants_to_be_the_overlap():
    score, boxes, positive = batch()
    found = tracking_loss((score, boxes), TRUTH, positive)
    (slope,) = torch.autograd.grad(found.classification, score)
    target = score.sigmoid() - slope * positive.sum()
    expected = torch.where(positive, overlap(boxes, TRUTH[:, None, None])[0], 0.0)
    assert_close(target, expected)
    assert_close(found.iou, expected[positive].mean())


def test_regression_is_the_mean_of_what_generalised_overlap_misses():
    score, boxes, positive = batch()
    missed = 1 - overlap(boxes, TRUTH[:, None, None])[1][positive]
    assert_close(tracking_loss((score, boxes), TRUTH, positive).regression, missed.mean())


def test_batch_twice_has_the_same_loss():
    score, boxes, positive = batch()
    once = tracking_loss((score, boxes), TRUTH, positive)
    double = [torch.cat([part, part]) for part in (score, boxes, TRUTH, positive)]
    twice = tracking_loss((double[0], double[1]), double[2], double[3])
    assert_close(torch.stack(twice), torch.stack(once))


def test_batch_without_a_positive_cell_is_divided_by_one():
    score, boxes, positive = batch()
    found = tracking_loss((score, boxes), TRUTH, torch.zeros_like(positive))
    assert_close(found.total, F.softplus(score).sum())
    assert_close(torch.stack([found.regression, found.iou]), torch.zeros(2))


def test_half_precision_predictions_are_summed_in_float32():
    score, boxes, positive = batch()
    found = tracking_loss((score.half(), boxes.half()), TRUTH, positive)
    assert found.total.dtype == torch.float32
    assert_close(found.total, tracking_loss((score, boxes), TRUTH, positive).total, factor=100)


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_batch(tmp_path):
    run_pair(__file__, str(tmp_path))
    score, boxes, positive = batch()
    tracking_loss((score, boxes), TRUTH, positive).total.backward()
    parts = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    # Rank 0 had the first sample, rank 1 the others; their mean is what a wrapper for data
    # parallel training makes of the two gradients.
    assert positive[0].sum() != positive[1:].sum()
    assert_close(torch.from_numpy(parts[0]) / 2, score.grad[:1])
    assert_close(torch.from_numpy(parts[1]) / 2, score.grad[1:])


def one_of_two(folder: Path) -> None:
    """Write this process's gradient of its part of the batch."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    score, boxes, positive = batch()
    own = score.detach()[part].requires_grad_()
    tracking_loss((own, boxes[part]), TRUTH[part], positive[part]).total.backward()
    np.save(folder / f"{rank}.npy", own.grad.numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
