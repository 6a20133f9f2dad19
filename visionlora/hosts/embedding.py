"""Embedding: the view is `weight.T`, so a factor pair is a table of r columns and a small matrix.

    y = W^T[:, i] + s * B A[:, i]

The row of `padding_idx` never changes, as it never trains in the plain layer.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.hosts.base import Host
from visionlora.hosts.linear import output_change
from visionlora.sites import Kind


class EmbeddingLayer:
    """The operators of an embedding (see `visionlora.methods.base.Layer`)."""

    kind: Kind = "embedding"
    channels: int = -1

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def down(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Look up columns of `(r, vocabulary)`."""
        return F.embedding(x, matrix.t())

    def up(self, h: Tensor, matrix: Tensor) -> Tensor:
        """`h B^T`."""
        return F.linear(h, matrix)

    def per_output(self, vector: Tensor) -> Tensor:
        """Outputs are the last dimension."""
        return vector

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Indices cannot be dropped; `inject` refuses the option."""
        return x


class EmbeddingHost(Host):
    """An Embedding with adapters."""

    weight: Tensor

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows plus the active changes."""
        embedding = cast(nn.Embedding, self)
        base = F.embedding(
            index,
            self.weight,
            embedding.padding_idx,
            None,
            2.0,
            embedding.scale_grad_by_freq,
            embedding.sparse,
        )
        y = base
        for slot in self.slots:
            part = output_change(base, index, slot, EmbeddingLayer(self.weight.t()))
            if embedding.padding_idx is not None:
                part = part.masked_fill((index == embedding.padding_idx)[..., None], 0.0)
            y = y + part
        return y
