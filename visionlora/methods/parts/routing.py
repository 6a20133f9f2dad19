"""What the routed methods share: gates in full precision, and the mean gates that freeze them.

Routers work on features in the last dimension, so the result of `Layer.down`, whose features are
in dimension `channels` and repeat once per convolution group, is seen as `(..., groups, r)`.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visionlora.methods.base import Delta, Layer


class RoutedDelta(Delta):
    """A change that mixes a few matrices by gates that depend on the input."""

    mergeable: ClassVar[bool] = False
    watch: "MeanGates | None" = None
    """Where the gates of every forward are added up, if anyone asks for them."""

    def frozen_factors(
        self, gates: Float[Tensor, " choices"]
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(up, down)` of the change that constant gates give, without the scale."""
        raise NotImplementedError


class MeanGates:
    """The mean of all gates seen."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, gates: Tensor) -> None:
        """Count gates of any leading shape."""
        rows = gates.reshape(-1, gates.shape[-1]).double()
        self._sum = rows.sum(0) if self._sum is None else self._sum + rows.sum(0)
        self._count += len(rows)

    @property
    def value(self) -> Tensor | None:
        """The mean, or None if there were no gates."""
        return None if self._sum is None else self._sum / self._count


def features_last(h: Tensor, layer: Layer, size: int) -> Tensor:
    """Return the result of `down` with `size` rows as `(..., groups, size)`."""
    return h.movedim(layer.channels, -1).unflatten(-1, (-1, size))


def features_back(h: Tensor, layer: Layer) -> Tensor:
    """Undo `features_last`."""
    return h.flatten(-2).movedim(-1, layer.channels)


def by_sample(rows: Tensor, layer: Layer) -> Float[Tensor, "samples tokens r"]:
    """Return `(..., groups, r)` with the first dimension as samples and all others as tokens."""
    single = rows.dim() == (4 if layer.kind == "conv" else 2)
    return (rows[None] if single else rows).flatten(1, -2)


def full_precision(x: Tensor) -> Tensor:
    """Return half-precision features in float32; indices and wider types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def top_softmax(
    logits: Float[Tensor, "*batch choices"], top: int | None
) -> tuple[Float[Tensor, "*batch choices"], Bool[Tensor, "*batch choices"]]:
    """Return the softmax over the `top` largest logits (None: all), and which those are."""
    if top is None or top >= logits.shape[-1]:
        return logits.softmax(-1), torch.ones_like(logits, dtype=torch.bool)
    best = logits.topk(top, dim=-1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    return logits.masked_fill(~chosen, -torch.inf).softmax(-1), chosen
