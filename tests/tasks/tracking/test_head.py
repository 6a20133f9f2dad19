"""The head: raw scores and boxes around the cells."""

import pytest
import torch

from tasks.tracking.model.head import Head
from tests.tolerances import assert_close


@pytest.mark.parametrize("cell", [(0, 0), (2, 1)])
def test_zero_logits_give_a_unit_box_around_the_cell(cell: tuple[int, int]) -> None:
    head, (row, column) = Head(8, 4), cell
    for parameter in head.reg_mlp.parameters():
        parameter.data.zero_()
    box = head(torch.randn(1, 16, 8)).boxes[0, row, column]
    x, y = (column + 0.5) / 4, (row + 0.5) / 4
    assert_close(box, torch.tensor([x - 0.5, y - 0.5, x + 0.5, y + 0.5]))


def test_sides_are_left_top_right_bottom() -> None:
    head = Head(8, 4)
    for parameter in head.reg_mlp.parameters():
        parameter.data.zero_()
    head.reg_mlp.layers[-1].bias.data = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    left, top, right, bottom = torch.tensor([-9.0, 0.0, 1.0, 9.0]).sigmoid()
    box = head(torch.randn(1, 16, 8)).boxes[0, 1, 2]
    x, y = 2.5 / 4, 1.5 / 4
    assert_close(box, torch.stack([x - left, y - top, x + right, y + bottom]))


def test_cells_are_row_major_and_independent() -> None:
    head, tokens = Head(8, 4), torch.randn(1, 16, 8)
    before = head(tokens)
    tokens[0, 6] += 1
    changed = (head(tokens).score != before.score)[0].nonzero()
    assert changed.tolist() == [[1, 2]]


def test_count_and_start() -> None:
    head = Head(192, 16)
    assert sum(item.numel() for item in head.parameters()) == 4 * 192**2 + 9 * 192 + 5
    for name, item in head.named_parameters():
        if name.endswith("bias"):
            assert not bool(item.any())
        elif item.numel() > 10_000:
            assert float(item.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not head.state_dict().keys() - dict(head.named_parameters()).keys()


def test_scores_are_raw() -> None:
    head = Head(8, 4)
    head.cls_mlp.layers[-1].bias.data += 7
    assert float(head(torch.zeros(1, 16, 8)).score.detach().min()) > 6
