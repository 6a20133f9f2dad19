"""Tensors that many layers share and that are computed once per training step.

A hyper-network emits the factors of all sites at once. `GraphCache` keeps them, with their graph,
until they are out of date: a parameter they came from has changed, gradients are switched on or
off, or a backward has passed through them, which frees the graph. No hook on the model is needed,
so it does not matter which of the model's methods is called.

Gradient checkpointing repeats layers inside the backward, for their values only: they get the
tensors of the forward, spent or not, and what building them took is out of the checkpoint's sight.

All forwards between two backwards share one graph, so add their losses up before the backward, or
retain the graph.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from visionlora.methods.parts.recompute import in_backward, kept_for_backward


class GraphCache:
    """Holds the result of one build; empty again after a copy or pickle."""

    def __init__(self) -> None:
        self._graph = False
        self._spent = False
        self._sources: list[tuple[Tensor, int]] = []
        self._tensors: list[Tensor] = []

    def get(
        self,
        sources: Iterable[Tensor],
        build: Callable[[], list[Tensor]],
        *,
        linear: bool = False,
    ) -> list[Tensor]:
        """Return what `build` made from `sources`, built again only if it is out of date.

        Args:
            sources: the parameters that the result depends on.
            build: returns a list of tensors.
            linear: the graph keeps no tensor, so that a backward does not use it up.
        """
        if torch.compiler.is_compiling():  # the compiler merges equal computations itself
            return build()
        now = [(item, item._version) for item in sources]
        repeated = in_backward()
        outdated = self._graph != torch.is_grad_enabled() or not _same(now, self._sources)
        if outdated or (self._spent and not repeated):
            with kept_for_backward():
                self._tensors = build()
            self._graph, self._sources, self._spent = torch.is_grad_enabled(), now, False
            # What reentrant checkpointing builds inside a backward is good for that part alone.
            used = self._clear_after if repeated else self._spend
            for tensor in [] if linear else self._tensors:
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(used)
        return self._tensors

    def clear(self) -> None:
        """Forget the result."""
        self._sources, self._tensors = [], []

    def _spend(self, gradient: Tensor | None) -> None:
        self._spent = True

    def _clear_after(self, gradient: Tensor | None) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphCache":
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()


def _same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    """Whether both list the same tensors at the same versions."""
    return len(one) == len(other) and all(
        a is b and version == kept for (a, version), (b, kept) in zip(one, other, strict=True)
    )
