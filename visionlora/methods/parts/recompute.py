"""State that outlives one layer's forward, beside gradient checkpointing.

Checkpointing runs parts of the forward a second time inside the backward, only to get the tensors
that were not kept. What a method remembers between layers must come out the same there, must not
be recorded twice, and must not be counted among the tensors that the checkpoint expects to see
again: a region may have been the first to need a shared result, but find it ready the second time.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether a backward is under way on this thread, so that this forward is a repetition."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def kept_for_backward() -> AbstractContextManager[Any]:
    """Return a context whose tensors autograd keeps itself, out of sight of any checkpoint."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_values, _unchanged)


class Latest:
    """Holds a tensor with its graph; empty again after a copy or pickle."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return the tensor once: a graph serves one backward."""
        value, self.value = self.value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Latest":
        return Latest()

    def __reduce__(self) -> Any:
        return Latest, ()


def _values(tensor: Tensor) -> Tensor:
    """Return the values alone: a node that kept its own output would never be freed."""
    return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
