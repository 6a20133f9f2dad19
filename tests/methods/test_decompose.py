"""Frozen factors of a weight: the SVD with fixed signs, and the LDU of any shape."""

import pytest
import torch

from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.parts.decompose import ldu, smallest_svd, truncated_svd

SHAPES = pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)])


def weight(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@SHAPES
def test_the_singular_vectors_are_orthonormal_and_give_the_best_approximation(shape):
    W = weight(shape)
    full = torch.linalg.svdvals(W)
    for rank in range(1, min(shape) + 1):
        U, S, V = truncated_svd(W, rank, "x")
        assert_close(S, full[:rank])
        for vectors in (U.t() @ U, V @ V.t()):
            assert_close(vectors, torch.eye(rank, dtype=torch.float64))
        error = (W - U * S @ V).square().sum()
        assert_close(error, full[rank:].square().sum())


@SHAPES
def test_the_smallest_triples_are_what_the_largest_leave(shape):
    W = weight(shape)
    for rank in range(1, min(shape)):
        U, S, V = truncated_svd(W, min(shape) - rank, "x")
        u, s, v = smallest_svd(W, rank, "x")
        assert_close(u * s @ v, W - U * S @ V)
        assert_close(s, torch.linalg.svdvals(W)[-rank:])
        for vectors in (u.t() @ u, v @ v.t()):
            assert_close(vectors, torch.eye(rank, dtype=torch.float64))
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


@SHAPES
def test_the_largest_entry_of_every_left_vector_is_positive(shape):
    for W in (weight(shape), -weight(shape)):
        U, _, _ = truncated_svd(W, min(shape), "x")
        largest = U.gather(0, U.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("decompose", [lambda W: truncated_svd(W, 4, "x"), lambda W: ldu(W, "x")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_factors_depend_on_the_values_only(decompose, dtype):
    W = weight((8, 6), dtype)
    strided = torch.stack([W, W], -1)[..., 0]
    for other in (W.double(), strided, W.t().contiguous().t()):
        for one, two in zip(decompose(W), decompose(other), strict=True):
            assert one.dtype == torch.float64
            assert_close(one, two)


def test_a_weight_of_low_rank_has_orthonormal_vectors_all_the_same():
    W = weight((10, 2)) @ weight((2, 8))
    U, S, V = truncated_svd(W, 6, "x")
    assert_close(U * S @ V, W)
    for vectors in (U.t() @ U, V @ V.t()):
        assert_close(vectors, torch.eye(6, dtype=torch.float64))
    assert float(S[2:].max()) < 1e-7 * float(S[0])


@SHAPES
def test_the_product_of_ldu_is_the_weight(shape):
    W = weight(shape)
    left, d, U = ldu(W, "x")
    assert_close(left * d @ U, W)
    size = min(shape)
    assert left.shape == (shape[0], size)
    assert U.shape == (size, shape[1])
    assert_close(U.diagonal(), torch.ones(size, dtype=torch.float64))
    assert not U.tril(-1).any()
    # a permutation of the rows makes the left factor unit lower triangular, with entries up to 1
    _, packed, _ = torch.linalg.lu(W)
    assert float(left.abs().max()) == 1.0
    assert_close(left.sort(0).values, packed.sort(0).values)


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(4, 6, dtype=torch.float64),
        torch.ones(5, 5, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64)[:, [0, 0, 1, 2, 3, 4]],
        weight((9, 3)) @ weight((3, 9)),
    ],
    ids=["zero", "ones", "repeated", "low-rank"],
)
def test_a_singular_weight_has_finite_factors_whose_product_it_is(W):
    left, d, U = ldu(W, "x")
    for item in (left, d, U):
        assert bool(torch.isfinite(item).all())
    assert_close(left * d @ U, W)
    assert bool((d == 1).any())


def test_a_weight_with_nan_is_refused():
    W = weight((3, 3))
    W[1, 1] = float("nan")
    for decompose in (lambda: truncated_svd(W, 2, "head.weight"), lambda: ldu(W, "head.weight")):
        with pytest.raises(ConfigError, match=r"head\.weight holds NaN"):
            decompose()


def test_a_weight_without_values_is_refused():
    W = torch.empty(3, 3, device="meta")
    for decompose in (lambda: truncated_svd(W, 2, "head.weight"), lambda: ldu(W, "head.weight")):
        with pytest.raises(ConfigError, match=r"head\.weight has no values yet"):
            decompose()
