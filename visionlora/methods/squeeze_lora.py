r"""In-Squeeze LoRA: ranks that are halved while training (Vulić et al. 2026, arXiv 2602.10993).

    Delta W = s * B A,   B: out x r_now,  A: r_now x in,   s = alpha / rank

Training begins at `start_rank` (limited by the size of the site) and ends at `rank`. Every halving
replaces the pair by its best approximation of the smaller rank, from the factors alone; the factor
s stays. The schedule is derived (the paper gives none in numbers): with n = log2(start_rank / rank)
halvings, number i comes at 0.15 + 0.55 i / n of the run, so the last comes before 0.7 of it. The
moments of A and B start afresh, and their learning rate rises again over 1 % of the run.

Initial values are those of LoRA: A uniform in +-1/sqrt(in), B = 0 (`init="normal"`: both normal).
Trained: min(start_rank, out, in) (out + in) scalars a site at first, rank (out + in) at the end,
when the site becomes plain LoRA. `start_rank` in a file is the rank that the pair had then.
Merge: W + s B A.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, reset_zero_pair
from visionlora.ranks.in_squeeze import InSqueeze
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class SqueezeLoRAConfig(LowRankConfig):
    """Options of In-Squeeze LoRA."""

    method: ClassVar[str] = "squeeze-lora"

    init: Literal["zero", "normal"] = "zero"
    """`zero`: LoRA's own start. `normal`: both factors from N(0, 0.02^2)."""

    start_rank: int | None = None
    """Rank at the beginning of training, at least `rank`; None means 4 * `rank`."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.start_rank is not None and self.start_rank < self.rank:
            raise ConfigError(
                f"squeeze-lora: start_rank must be at least the rank, got {self.start_rank} and "
                f"rank {self.rank}"
            )

    @property
    def current_rank(self) -> int:
        """Rank of a pair that is built now, at a site that is large enough."""
        return 4 * self.rank if self.start_rank is None else self.start_rank


class SqueezeLoRA(Delta):
    """A factor pair that is wider than its target."""

    def __init__(self, config: SqueezeLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        rank = min(config.current_rank, site.max_rank)
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, rank))

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "zero"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw both factors."""
        if self.options.init == "normal":
            self.A.copy_(torch.empty(self.A.shape).normal_(0.0, 0.02, generator=generator))
            self.B.copy_(torch.empty(self.B.shape).normal_(0.0, 0.02, generator=generator))
        else:
            reset_zero_pair(self.A, self.B, self.kind, generator)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`."""
        return self.B, self.A

    def kept(self) -> Tensor:
        """Return that every rank is left, so that the site becomes plain LoRA."""
        return torch.ones(len(self.A), dtype=torch.bool, device=self.A.device)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return min(start_rank, out, in) (out + in)."""
        rank = min(config.current_rank, out_features, in_features)
        return int(rank * (out_features + in_features))


register(SqueezeLoRAConfig, SqueezeLoRA, controller=InSqueeze)
