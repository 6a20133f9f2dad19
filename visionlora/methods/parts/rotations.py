"""Rotations of blocks of features, made from skew matrices: the parts of OFT and BOFT.

The Cayley transform R(Q) = (I + Q) (I - Q)^-1 of Q = -Q^T is orthogonal, and R(0) = I.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.sites import Site


def entries(block: int) -> int:
    """Return the number of free entries of a skew matrix."""
    return block * (block - 1) // 2


def skew(values: Float[Tensor, "*batch entries"], block: int) -> Float[Tensor, "*batch b b"]:
    """Return skew matrices from their upper triangles, row by row."""
    rows, columns = torch.triu_indices(block, block, 1, device=values.device).unbind()
    upper = values.new_zeros(*values.shape[:-1], block, block)
    upper[..., rows, columns] = values
    return upper - upper.mT


def cayley(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """Return R(Q), in at least float32; exactly the identity for Q = 0."""
    Q = Q if Q.dtype == torch.float64 else Q.float()  # no linear solve in half precision
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye - Q, eye + Q)


def cayley_series(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """Return (I + Q) (I + Q + Q^2 + Q^3), which is R(Q) up to terms of fourth order."""
    square = Q @ Q
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return eye + 2 * Q + 2 * square + 2 * square @ Q + square @ square


def rotate_blocks(
    x: Float[Tensor, "*batch features"], blocks: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch features"]:
    """Multiply each run of b features by its matrix; one matrix serves all runs if n is 1."""
    runs = x.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("...nj,nij->...ni", runs, blocks).flatten(-2)


def rotate_butterfly(
    x: Float[Tensor, "*batch features"], blocks: Float[Tensor, "n b b"], level: int
) -> Float[Tensor, "*batch features"]:
    """Multiply as `rotate_blocks`, each block made of two half-blocks 2^level half-blocks apart."""
    if level == 0:
        return rotate_blocks(x, blocks)
    half = blocks.shape[-1] // 2
    x = x.unflatten(-1, (-1, 2, 2**level, half)).transpose(-3, -2).flatten(-4)
    x = rotate_blocks(x, blocks)
    return x.unflatten(-1, (-1, 2**level, 2, half)).transpose(-3, -2).flatten(-4)


def butterfly(rotations: Float[Tensor, "depth n b b"]) -> Float[Tensor, "groups g g"]:
    """Return the product R_1 R_2 ... of butterflies, which mixes groups of g = b 2^(depth-1)."""
    depth, count, block, _ = rotations.shape
    size = block * 2 ** (depth - 1)
    eye = torch.eye(size, dtype=rotations.dtype, device=rotations.device)
    rows = eye.repeat(1, count * block // size)
    for level, blocks in enumerate(rotations.mT):
        rows = rotate_butterfly(rows, blocks, level)
    return rows.unflatten(1, (-1, size)).transpose(0, 1)


def rotated_features(site: Site) -> int:
    """Return how many features are rotated: the inputs, or the outputs of an Embedding."""
    return site.out_features if site.kind == "embedding" else site.in_features


def check_divides(method: str, number: int, what: str, site: Site) -> None:
    """Refuse a block that does not divide the rotated features."""
    features = rotated_features(site)
    if features % number:
        raise ConfigError(
            f"{method}: {what} must divide the rotated features, got {number} and {features} "
            f"features at {site.name or 'the layer'}"
        )
