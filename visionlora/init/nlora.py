r"""NLoRA: three factors cut out of the weight, after Nystrom (Guo et al. 2025, arXiv 2502.14482).

    B = W[:, J],   A = W[I, :],   N = W[I, J]  (raw)   or   pinv(W[I, J])  (pinv),   |I| = |J| = r
    Delta W = s B N A                      (official: the function starts changed)
    Delta W = s (B N A - B0 N0 A0)         (residual=True: it starts as it was)

With the pseudo-inverse, `B N A` is Nystrom's approximation: equal to W in the rows I and the
columns J, and everywhere if W and W[I, J] have rank r. On a weight without such structure it is
several times as large as W, because W[I, J] is close to singular: it is only taken with
`residual=True`, and a warning names the layers where it outweighs W. The paper's code takes the
slice itself (raw), which stays small.

I and J are the first r rows and columns (official), or `random`, or those of the largest `norm`
(both derived). Recommended for vision (derived): `residual=True`.

On LoRA-XS this is IntTune: B and A are frozen, N is all that trains, r^2 scalars a site. With
`residual=True` its core then starts at zero (derived): what trains is N - N0, whose gradient is
that of N, so the choice of N0 makes no difference.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visionlora.config import Form
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Start
from visionlora.registry import register_initialiser, register_preset

logger = logging.getLogger("visionlora")


@dataclass(frozen=True, kw_only=True)
class NLoRA(Initialiser):
    """Columns, rows and their crossing."""

    name: ClassVar[str] = "nlora"
    forms: ClassVar[frozenset[Form]] = frozenset({"middle", "core"})

    intermediate: Literal["raw", "pinv"] = "raw"
    """What lies between the columns and the rows: their crossing, or its pseudo-inverse."""
    residual: bool = False
    """Whether the start is taken off, so that the function does not change."""
    index: Literal["first", "random", "norm"] = "first"
    """Which rows and columns."""

    def __post_init__(self) -> None:
        """Check types and that a pseudo-inverse is taken off."""
        super().__post_init__()
        if self.intermediate == "pinv" and not self.residual:
            raise ConfigError(
                "nlora: intermediate='pinv' needs residual=True: the product may be several times "
                "as large as the weight"
            )

    def start(self, given: Given) -> Start:
        """Cut the three factors out of the weight."""
        weight = given.weight
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"nlora: the weight of {given.where} holds NaN or infinity")
        rows, columns = (
            self._chosen(weight.norm(dim=1), given),
            self._chosen(weight.norm(dim=0), given),
        )
        up, down, core = weight[:, columns], weight[rows], weight[rows][:, columns]
        if given.form == "core" and self.residual:
            return Start(up, down, torch.zeros_like(core))
        if self.intermediate == "pinv":
            core = torch.linalg.pinv(core)
            size, whole = given.scale * (up @ core @ down).norm(), weight.norm()
            if size > whole:
                logger.warning(
                    "nlora: at %s the part that is taken off is %.1f times as large as the weight; "
                    "intermediate='raw' stays far below it",
                    given.where,
                    float(size / whole),
                )
        return Start(up, down, core, taken_off=self.residual)

    def _chosen(self, norms: Tensor, given: Given) -> Tensor:
        """Return the indices of r rows or columns in order."""
        if self.index == "random":
            order = torch.randperm(len(norms), generator=given.generator)
        elif self.index == "norm":
            order = norms.argsort(descending=True, stable=True)
        else:
            order = torch.arange(len(norms))
        return order[: given.rank].sort().values


register_initialiser(NLoRA)
register_preset("nlora", "slora", "SLoRA that starts as parts of the weight", "nlora")
register_preset("inttune", "lora-xs", "A trained core between parts of the weight", "nlora")
