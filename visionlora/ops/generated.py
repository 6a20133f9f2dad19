r"""Linear combinations of random matrices that are generated on the fly and never stored.

    combine:  R[s] = sum_i c[s, i] M_i          project:  p[s, i] = <M_i, R[s]>

The entries of the M_i are uniform in +-bound, float32, out of one seeded CPU generator, one matrix
after the other and a few at a time; all rows s share one pass over the stream. Numbers depend
neither on how many are drawn at a time (up to rounding) nor on the device, and no global generator
is touched. The two functions are linear and each is the other's derivative, so nothing is kept for
backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("visionlora::combine_generated", mutates_args=())
def combine_generated(
    coefficients: Tensor, height: int, width: int, seed: int, chunk: int, bound: float
) -> Tensor:
    """Return `(rows, height, width)`: one combination per row of `coefficients`.

    Args:
        coefficients: `(rows, terms)`.
        height: of every generated matrix.
        width: of every generated matrix.
        seed: of the stream.
        chunk: how many matrices exist at a time.
        bound: of the entries.
    """
    rows, terms = coefficients.shape
    result = coefficients.new_zeros(rows, height * width)
    for start, piece in _pieces(terms, height * width, seed, chunk, bound):
        result.addmm_(coefficients[:, start : start + len(piece)], piece.to(result))
    return result.view(rows, height, width)


@torch.library.custom_op("visionlora::project_generated", mutates_args=())
def project_generated(matrices: Tensor, terms: int, seed: int, chunk: int, bound: float) -> Tensor:
    """Return `(rows, terms)`: the inner products of every row with every generated matrix."""
    flat = matrices.reshape(matrices.shape[0], -1)
    result = flat.new_zeros(flat.shape[0], terms)
    for start, piece in _pieces(terms, flat.shape[1], seed, chunk, bound):
        result[:, start : start + len(piece)].addmm_(flat, piece.to(result).t())
    return result


def _pieces(
    count: int, entries: int, seed: int, chunk: int, bound: float
) -> Iterator[tuple[int, Tensor]]:
    """Yield the stream in pieces: the number of the first matrix, and matrices as rows."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for start in range(0, count, chunk):
        piece = torch.empty(min(chunk, count - start), entries, dtype=torch.float32, device="cpu")
        yield start, piece.uniform_(-bound, bound, generator=generator)


# Sizes may be symbols while a compiler traces, so they are not annotated as numbers here.
@combine_generated.register_fake
def _(coefficients: Tensor, height: Any, width: Any, seed: Any, chunk: Any, bound: float) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], height, width)


@project_generated.register_fake
def _(matrices: Tensor, terms: Any, seed: Any, chunk: Any, bound: float) -> Tensor:
    return matrices.new_empty(matrices.shape[0], terms)


def _remember_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.stream = (inputs[0].shape[1], *inputs[3:])


def _combine_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return project_generated(g, *ctx.stream), None, None, None, None, None


def _remember_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.stream = (*inputs[0].shape[1:], *inputs[2:])


def _project_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return combine_generated(g, *ctx.stream), None, None, None, None


combine_generated.register_autograd(_combine_backward, setup_context=_remember_combine)
project_generated.register_autograd(_project_backward, setup_context=_remember_project)
