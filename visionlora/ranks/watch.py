"""The gradient of a site's change without storing it: inputs and output gradients of one step.

A watched Delta forms its part of the output itself and hooks its gradient. For any chunk of rows,
the gradient of the change is then that of the layer's own operators, so every kind of layer has the
same rule. In dense mode the gradient of the change is there as a matrix anyway.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.methods.base import Layer

_CHUNK = 1 << 22
"""Entries of the change that are looked at together."""


class Watched:
    """What was seen of one site since the last `clear`."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor, Layer]] = []
        self._dense: Tensor | None = None

    def clear(self) -> None:
        """Forget everything."""
        self._seen.clear()
        self._dense = None

    def add(self, x: Tensor, gradient: Tensor, layer: Layer) -> None:
        """Note input and output gradient of one call of the layer."""
        self._seen.append((x, gradient.detach(), layer))

    def add_dense(self, gradient: Tensor) -> None:
        """Note the gradient of a change that was formed as a matrix."""
        self._dense = gradient.detach() + (0.0 if self._dense is None else self._dense)

    def sensitivity(
        self,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        groups: int,
        mean: Callable[[Tensor], Tensor],
        chunk: int | None = None,
    ) -> Float[Tensor, ""]:
        """Return `sum |up down * G|` for the gradient G of the change, chunk by chunk of rows.

        Args:
            up: first factor of the change, with its scale.
            down: second factor.
            groups: convolution groups of the site.
            mean: averages over processes, so that all find the same number.
            chunk: rows at once.
        """
        rows, columns = up.shape[0], down.shape[1]
        if chunk is None or groups > 1:
            chunk = rows if groups > 1 else max(1, _CHUNK // columns)
        total = up.new_zeros(())
        for start in range(0, rows, chunk):
            stop = min(rows, start + chunk)
            gradient = mean(self._rows(start, stop, up, columns, groups))
            total = total + (gradient * (up[start:stop] @ down)).abs().sum()
        return total

    def _rows(self, start: int, stop: int, like: Tensor, columns: int, groups: int) -> Tensor:
        """Return rows of the gradient of the change."""
        result = like.new_zeros(stop - start, columns)
        if self._dense is not None:
            result = result + self._dense[start:stop].to(like.dtype)
        for x, gradient, layer in self._seen:
            x = x.to(like.dtype) if x.is_floating_point() else x
            with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
                change = torch.zeros_like(result).requires_grad_()
                if groups == 1:
                    output = layer.down(x, change)
                    gradient = gradient.narrow(layer.channels, start, stop - start)
                else:  # the rows of a group see only its inputs, which `up` knows
                    identity = torch.eye(columns, dtype=like.dtype, device=like.device)
                    output = layer.up(layer.down(x, identity), change)
                (found,) = torch.autograd.grad(output, change, gradient.to(output.dtype))
            result = result + found
        return result


def watched_gradient(watched: Watched, x: Tensor, layer: Layer) -> Callable[[Tensor], None]:
    """Return a hook for the gradient of a part of the output."""

    def note(gradient: Tensor) -> None:
        watched.add(x, gradient, layer)

    return note
