r"""Methods that train a factor pair, less a constant pair if there is one.

    Delta W = s * (U D - B0 A0),   U: out x r,  D: r x in,  B0: out x k,  A0: k x in

U and D come from what is trained: `(B, A)` for LoRA and DoRA, the sum of the arms and the shared
block for Block-LoRA, `(B N, A)` for SLoRA. The constant pair is how a start at a part of the weight
(PiSSA, OLoRA, LoRA-GA, ...) leaves the function as it was without touching the weight, and how
restarts (ReLoRA) keep what was trained before. Files and checkpoints always hold it.

Where both pairs have the same rank the difference is formed as

    U D - B0 A0 = [U - B0, B0] [D; D - A0]

(derived): exactly zero at first, and as exact as training's own steps in any precision; as a
difference of two products bfloat16 would leave noise of the size of B0 A0 in the output.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared
from visionlora.sites import Site

if TYPE_CHECKING:
    from visionlora.init.base import Start


@dataclass(frozen=True, kw_only=True)
class PairConfig(LowRankConfig):
    """Options of methods that train a factor pair."""

    offset: int = 0
    """Rank of the constant pair that is taken off, 0 for none; initialisers and restarts set it."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.offset < 0:
            raise ConfigError(f"{self.method}: offset must not be negative, got {self.offset}")


class PairDelta(Delta):
    """Base of the methods that train a factor pair `A`, `B`."""

    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor
    B0: Tensor
    arms: int = 1
    """Number of up-matrices that lie side by side in B and are added up."""

    @property
    def rank(self) -> int:
        """Inner dimension of the trained pair."""
        return self.A.shape[0]

    def __init__(self, config: PairConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.offset = config.offset
        self.kind = site.kind
        self.carried = bool(config.offset)

    def add_constant(self, folded: int) -> None:
        """Register the constant pair, zero at first; subclasses call it when A and B are there.

        Args:
            folded: columns of A, the input features over `fold`.
        """
        if self.offset:
            out, k = self.B.shape[0], self.offset
            self.register_buffer("A0", torch.zeros(k, folded), persistent=False)
            self.register_buffer("B0", torch.zeros(out, k), persistent=False)

    def trained_pair(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank folded"]]:
        """Return the pair that training moves."""
        return self.B, self.A

    def inner_pair(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k folded"]]:
        """Return the trained pair less the constant one."""
        up, down = self.trained_pair()
        if not self.offset:
            return up, down
        if up.shape[1] == self.offset:
            return torch.cat([up - self.B0, self.B0], 1), torch.cat([down, down - self.A0])
        return torch.cat([up, -self.B0], 1), torch.cat([down, self.A0])

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k folded"]] | None:
        """Return the change as a pair."""
        return self.inner_pair()

    @torch.no_grad()
    def begin(self, start: "Start", weight: Float[Tensor, "out in"]) -> None:
        """Take the values of an initialiser.

        Args:
            start: what the pair begins with; where it is taken off, `offset` is its rank.
            weight: the frozen weight.
        """
        self._set(start)
        if start.taken_off:
            up, down = self.trained_pair()
            self.B0.copy_(up)
            self.A0.copy_(down)

    def _set(self, start: "Start") -> None:
        """Set what is trained so that the pair has the product of the start."""
        if start.down is not None:
            self.A.copy_(start.down)
        if start.up is not None:
            self.B.copy_((start.up / self.arms).repeat(1, self.arms))

    def frozen(self) -> dict[str, Tensor]:
        """The constant pair, if there is one."""
        return {"A0": self.A0, "B0": self.B0} if self.offset else {}
