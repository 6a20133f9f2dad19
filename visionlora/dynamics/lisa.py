r"""LISA: layerwise importance-sampled training (Pan et al. 2024, arXiv 2403.17919).

    every K applied steps:   S ~ uniform over the subsets of gamma of the L blocks
    trained: the blocks in S, and everything outside of blocks

Defaults: gamma = 2, K = 20 and the learning rate of full fine-tuning. Embeddings, the last norm and
the head always train. Blocks are recognised by name (see `visionlora.dynamics.blocks`); those of
several towers are one list. It works on the full changes of `full` and on base parameters that
`freeze_base(train=...)` left trainable, together or alone; masking low-rank factors is possible and
saves next to nothing.

`state="dropped"`: the moments of a block go when it is frozen and start from nothing when it is
drawn again, so the optimiser never holds more than gamma blocks and what always trains, where full
fine-tuning holds L. `state="kept"`: nothing is forgotten, and the memory grows to that of full
fine-tuning. With gamma = L the run is that of full fine-tuning, bit for bit.

The data-parallel wrapper is renewed at every draw. A compiled model compiles again for every new
set of blocks: train it uncompiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.masks import MASKED, WHY, Masks, refuse_reshaping, trained_blocks
from visionlora.errors import ConfigError
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class LISAConfig(DynamicsConfig):
    """Options of LISA."""

    name: ClassVar[str] = "lisa"
    forms: ClassVar[frozenset[Form] | None] = MASKED
    why: ClassVar[str] = WHY
    freezes: ClassVar[bool] = True

    gamma: int = 2
    """Number of blocks that train at a time."""
    every: int = 20
    """Applied steps between two draws."""
    state: Literal["dropped", "kept"] = "dropped"
    """What becomes of the optimiser's state of a block that is frozen."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for option in ("gamma", "every"):
            if getattr(self, option) < 1:
                raise ConfigError(f"lisa: {option} must be at least 1, got {getattr(self, option)}")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse methods that change shape, and a second dynamics that decides what is frozen."""
        refuse_reshaping(self.name, config)
        if any(other.name == "hft" for other in others):
            raise ConfigError("lisa and hft both decide what is frozen; choose one")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "LISA":
        """Freeze all but the first draw of blocks."""
        return LISA(
            model,
            optimizer,
            gamma=self.gamma,
            every=self.every,
            dropped=self.state == "dropped",
            seed=self.seed,
        )


class LISA(Masks):
    """Trains gamma blocks at a time."""

    name = "lisa"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gamma: int = 2,
        every: int = 20,
        dropped: bool = True,
        seed: int = 0,
    ) -> None:
        blocks = trained_blocks(self.name, model, optimizer)
        if gamma > len(blocks):
            raise ConfigError(
                f"lisa: gamma {gamma} is more than the {len(blocks)} blocks that are trained"
            )
        self.gamma = gamma
        super().__init__(model, optimizer, blocks, every=every, dropped=dropped, seed=seed)

    def draw(self) -> set[str]:
        """Return gamma of the blocks, every subset with the same probability."""
        blocks = list(self.units)
        order = torch.randperm(len(blocks), generator=self.generator, device="cpu")
        return {blocks[index] for index in order[: self.gamma].tolist()}


register_dynamics(LISAConfig)
register_preset("lisa", "full", "Full fine-tuning of a few random blocks at a time", "lisa")
