r"""svd: a tiny core between the weight's singular vectors (Balazy et al. 2024, arXiv 2405.17604).

    W = U S V^T,   B = U_r,  A = S_r V_r^T,  R ~ N(0, std^2),   Delta W = s B R A,   std = 1e-5

LoRA-XS's start. There B and A are frozen and are LoRA-XS's own, so that only R is set; `std=0`
starts at no change at all, and R has the same gradient. With a trained matrix between trained
factors (SLoRA) all three are set, and only the matrix in between moves in the first step when
`std=0`: those of B and A are products with R.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from visionlora.config import Form
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Start
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register_initialiser


@dataclass(frozen=True, kw_only=True)
class SVD(Initialiser):
    """The leading singular vectors around a small random core."""

    name: ClassVar[str] = "svd"
    forms: ClassVar[frozenset[Form]] = frozenset({"core", "middle"})

    std: float = 1e-5
    """Standard deviation of the core."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.std < 0:
            raise ConfigError(f"svd: std must not be negative, got {self.std}")

    def start(self, given: Given) -> Start:
        """Return the core, and around a trained one the bases too."""
        shape = (given.rank, given.rank)
        core = self.std * torch.empty(shape, dtype=torch.float64).normal_(generator=given.generator)
        if given.form == "core":
            return Start(core=core)
        U, S, V = truncated_svd(given.weight, given.rank, given.where)
        return Start(U, S[:, None] * V, core)


register_initialiser(SVD)
