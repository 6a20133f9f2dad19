"""A tensor that is made again in the backward instead of kept.

An adapted linear layer needs its input only for the gradient of its factors. If that input is
`make(origin)`, cheap to make, and `origin` is kept for the backward anyway (a LayerNorm and a GELU
keep what they were given), then keeping `origin` costs nothing. What comes out is the same tensor
bit for bit, and under `create_graph` it has the graph from `origin`, so second derivatives hold.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Rebuilt(NamedTuple):
    """What a tensor is made of."""

    origin: Tensor
    make: Callable[[Tensor], Tensor]
    """A pure function: the tensor is `make(origin)`."""
