"""A site: the 2-D view `(out, in)` of one frozen weight that a low-rank change is added to.

| layer | view | rows |
|---|---|---|
| Linear | `weight` | optional: one projection of a fused layer |
| Conv2d | `weight.reshape(out, in/groups * kh * kw)` | optional |
| Embedding | `weight.T`, so `out` is the width and `in` the vocabulary | - |
| LayerNorm, GroupNorm, BatchNorm2d, RMSNorm | `weight.reshape(d, 1)` | - |
| MultiheadAttention | `q`, `k`, `v` of `in_proj_weight` (or the three weights), `out` | implied |
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["linear", "conv", "embedding", "norm"]

WHOLE = "weight"
"""Key of a site that covers the whole weight."""


@dataclass(frozen=True)
class Site:
    """One adapted weight view: where it is and how large it is."""

    module: str
    """Dotted name of the layer, empty for a layer that stands alone."""
    key: str
    """`weight`, a slice name (`q`, `k`, `v`, `out`) or `rows_<start>_<stop>`."""
    kind: Kind
    """Which layer operators apply."""
    out_features: int
    """Rows of the view."""
    in_features: int
    """Columns of the view."""
    rows: tuple[int, int] | None = None
    """Row range inside the stored weight, or None for all of it."""
    groups: int = 1
    """Convolution groups."""
    bias: bool = False
    """Whether the layer has a bias."""
    kernel: int = 1
    """Columns per input channel: the entries of a convolution's kernel."""

    @property
    def name(self) -> str:
        """Full name, unique within a model: `<module>.<key>`."""
        return f"{self.module}.{self.key}" if self.module else self.key

    @property
    def max_rank(self) -> int:
        """Largest rank a change of this site can have."""
        return min(self.out_features, self.in_features)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `name` only.

    Seeded tensors are drawn from it in float32 and moved afterwards, so that every device and every
    order of construction gives the same numbers; the global generators are never touched.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
