"""Canonical pairs: the same change, one representative, whatever factors it came from."""

import pytest
import torch

from tests.tolerances import assert_close
from visionlora.generate import aligned_pair, canonical_pair

SHAPES = [(2, 7, 5), (3, 4, 9), (1, 3, 3), (4, 4, 4)]


def pair(rank: int, out: int, width: int, dtype=torch.float64):
    return torch.randn(rank, width, dtype=dtype), torch.randn(out, rank, dtype=dtype)


@pytest.mark.parametrize(("rank", "out", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_product_is_unchanged(rank, out, width, dtype):
    A, B = pair(rank, out, width, dtype)
    a, b = canonical_pair(A, B)
    assert a.shape == A.shape
    assert b.shape == B.shape
    assert a.dtype == b.dtype == dtype
    assert_close(b @ a, B @ A)


@pytest.mark.parametrize(("rank", "out", "width"), SHAPES)
def test_the_pair_is_balanced_and_its_signs_are_fixed(rank, out, width):
    a, b = canonical_pair(*pair(rank, out, width))
    assert_close(a @ a.T, b.T @ b)
    values = (a @ a.T).diagonal()
    assert_close(a @ a.T, torch.diag(values))
    assert bool((values[:-1] >= values[1:]).all())
    assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("rank", "out", "width"), SHAPES)
def test_every_pair_with_the_same_product_has_the_same_canonical_pair(rank, out, width):
    A, B = pair(rank, out, width)
    mix = torch.randn(rank, rank, dtype=torch.float64)
    one, other = canonical_pair(A, B), canonical_pair(torch.linalg.solve(mix, A), B @ mix)
    for here, there in zip(one, other, strict=True):
        assert_close(here, there, factor=1e3)
    for here, there in zip(one, canonical_pair(*one), strict=True):
        assert_close(here, there)


def test_an_untrained_pair_stays_zero():
    A, B = pair(2, 4, 5)
    a, b = canonical_pair(A, 0 * B)
    assert not a.any()
    assert not b.any()


@pytest.mark.parametrize(("rank", "out", "width"), SHAPES)
def test_alignment_undoes_every_turn_and_keeps_the_product(rank, out, width):
    A, B = canonical_pair(*pair(rank, out, width))
    turn, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    for here, there in zip(aligned_pair(turn.T @ A, B @ turn, (A, B)), (A, B), strict=True):
        assert_close(here, there)
    a, b = aligned_pair(A, B, pair(rank, out, width))
    assert_close(b @ a, B @ A)
