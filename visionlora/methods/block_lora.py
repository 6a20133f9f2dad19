r"""Block-LoRA: one shared down-projection block, several up-projections (2025, arXiv 2501.16720).

The paper's abstract says that the low-rank matrices are cut into blocks, that all blocks of the
down-projection are shared, and that matrix products turn into additions. No reference code is
public and only the abstract could be read, so both layouts here are derived. With n blocks:

`layout="rank"` (n divides r): B = [B_1 ... B_n], B_i: out x r/n; A_0: r/n x in, shared by all arms,

    Delta W = s * (B_1 + ... + B_n) A_0,   rank at most r/n

`layout="grid"` (n divides in): B: out x r; A_0: r x in/n, repeated along the input,

    Delta W = s * B [A_0 ... A_0],   y = W x + s * B A_0 dropout(x_1 + ... + x_n),   rank at most r

so the saved input of the branch shrinks n-fold (dropout acts after the slices are added).

Initial values (derived): A_0 uniform in +-1/sqrt(in) in both layouts, B = 0. Scale (derived, as
CLIP-LoRA): s = alpha / sqrt(r) with the nominal r, alpha = 1, r = 2, n = 2, dropout 0.25.
Trained: r in/n + r out scalars a site. Merge: W + Delta W.

Known property of the rank layout: all arms receive the same gradient, so arms that start at zero
stay equal, and training is that of LoRA of rank r/n whose up-matrix learns n times faster (and
decays n times slower). The arms are kept as parameters, but are added up before the product.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form
from visionlora.errors import ConfigError
from visionlora.methods.base import Shared, uniform
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class BlockLoRAConfig(PairConfig):
    """Options of Block-LoRA; the defaults are the CLIP few-shot recipe."""

    method: ClassVar[str] = "block-lora"
    form: ClassVar[Form] = "blocks"

    rank: int = 2
    """Nominal rank r."""
    alpha: float | None = 1.0
    """Numerator of the scale."""
    scaling: Literal["standard", "rslora"] = "rslora"
    """`rslora`: s = alpha / sqrt(r); `standard`: s = alpha / r."""
    dropout: float = 0.25
    """Dropout of the branch input while training."""
    blocks: int = 2
    """Number of blocks n."""
    layout: Literal["rank", "grid"] = "rank"
    """Which dimension is cut: the rank, or the input."""

    def __post_init__(self) -> None:
        """Check types, ranges and, for the rank layout, divisibility."""
        super().__post_init__()
        if self.blocks < 1:
            raise ConfigError(f"block-lora: blocks must be at least 1, got {self.blocks}")
        if self.layout == "rank" and self.rank % self.blocks:
            raise ConfigError(
                f"block-lora: blocks must divide the rank in layout 'rank', got {self.blocks} "
                f"blocks and rank {self.rank}"
            )

    def check_site(self, site: Site) -> None:
        """Refuse impossible ranks and, for the grid layout, inputs that n does not divide."""
        super().check_site(site)
        if self.layout == "grid" and site.in_features % self.blocks:
            raise ConfigError(
                f"block-lora: blocks must divide the input in layout 'grid', got {self.blocks} "
                f"blocks and {site.in_features} input features at {site.name or 'the layer'}"
            )


class BlockLoRA(PairDelta):
    """Several up-projections on one shared down-projection block."""

    def __init__(self, config: BlockLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.in_features = site.in_features
        by_rank = config.layout == "rank"
        self.fold = 1 if by_rank else config.blocks
        self.arms = config.blocks if by_rank else 1
        self.A = nn.Parameter(torch.empty(config.rank // self.arms, site.in_features // self.fold))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.add_constant(self.A.shape[1])

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A_0 with the full input as fan-in, set all arms to zero."""
        self.A.copy_(uniform(tuple(self.A.shape), self.in_features**-0.5, generator))
        self.B.zero_()

    def trained_pair(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank folded"]]:
        """Return the sum of the arms and the shared block."""
        if self.arms == 1:
            return self.B, self.A
        return self.B.unflatten(1, (self.arms, -1)).sum(1), self.A

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r in / n + r out."""
        return int(config.rank * in_features // config.blocks + config.rank * out_features)


register(BlockLoRAConfig, BlockLoRA)
