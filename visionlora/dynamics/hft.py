r"""Half Fine-Tuning: a random half of every block trains (Hui et al. 2024, arXiv 2404.18466).

    of n units of a category in a block:   n - floor(n / 2) drawn uniformly, the rest is frozen

A *unit* is one projection with its bias. Categories are attention (q, k, v, o: 2 of 4), norms (1 of
2), other matrices (fc1 and fc2 of a ViT: 1 of 2; the convolutions of a residual block together) and
other vectors (layer scales). Embeddings, the last norm, the head and all else outside of blocks
train. So a ViT trains 2 d^2 of 4 d^2 and 4 d^2 of 8 d^2 of every block.

A fused projection that carries the method `full` on its slices (`attn.qkv[q,k,v]`) has q, k and v
as units of their own. As one base weight it is one unit, because a tensor is frozen as a whole:
with o there are two, and a quarter or three quarters of the attention train.

The draw holds for the run, or for `reselect_every` applied steps; what is frozen then loses its
optimiser state. The categories follow the paper's description, the rounding, the vectors and
reselecting inside a run are derived. Learning rate as for full fine-tuning. Blocks are recognised
by name (see `visionlora.dynamics.blocks`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.masks import MASKED, WHY, Masks, refuse_reshaping, trained_blocks
from visionlora.errors import ConfigError
from visionlora.registry import register_dynamics, register_preset

_NORM = re.compile(r"(^|[._])(ln|bn|norm|layer_?norm|batch_?norm)(\d|_|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"(^|[._])(self_?)?attn|attention", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HFTConfig(DynamicsConfig):
    """Options of Half Fine-Tuning."""

    name: ClassVar[str] = "hft"
    forms: ClassVar[frozenset[Form] | None] = MASKED
    why: ClassVar[str] = WHY
    freezes: ClassVar[bool] = True

    reselect_every: int | None = None
    """Applied steps between two draws; None keeps the first one."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.reselect_every is not None and self.reselect_every < 1:
            raise ConfigError(
                f"hft: reselect_every must be at least 1 or None, got {self.reselect_every}"
            )

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse methods that change shape, and a second dynamics that decides what is frozen."""
        refuse_reshaping(self.name, config)
        if any(other.name == "lisa" for other in others):
            raise ConfigError("hft and lisa both decide what is frozen; choose one")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "HFT":
        """Freeze the first half."""
        return HFT(model, optimizer, reselect_every=self.reselect_every, seed=self.seed)


class HFT(Masks):
    """Trains half of every category of every block."""

    name = "hft"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        reselect_every: int | None = None,
        seed: int = 0,
    ) -> None:
        blocks = trained_blocks(self.name, model, optimizer)
        shapes = {name: item.dim() for name, item in model.named_parameters()}
        units: dict[str, list[str]] = {}
        self.categories: dict[tuple[str, str], list[str]] = {}
        """Units by block and category."""
        for block, names in blocks.items():
            for unit, own in units_of(names).items():
                units[unit] = own
                matrix = any(shapes[name] > 1 for name in own)
                key = block, category(unit.removeprefix(block), matrix=matrix)
                self.categories.setdefault(key, []).append(unit)
        super().__init__(model, optimizer, units, every=reselect_every, dropped=True, seed=seed)

    def draw(self) -> set[str]:
        """Return half of the units of every category, rounded up."""
        chosen: set[str] = set()
        for units in self.categories.values():
            order = torch.randperm(len(units), generator=self.generator, device="cpu").tolist()
            chosen.update(units[index] for index in order[len(units) // 2 :])
        return chosen


def units_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return `{projection or layer: names of its parameters}`."""
    result: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        # MultiheadAttention has the parameters of its first projections itself.
        part = re.match(r"(in|q|k|v)_proj(?=_)", leaf)
        result.setdefault(f"{owner}.{part[0]}" if part else owner, []).append(name)
    return result


def category(unit: str, *, matrix: bool) -> str:
    """Return what a unit shares a half with: its kind, from its name inside the block."""
    layer, _, _ = unit.partition(".adapters.")
    if _NORM.search(layer.rpartition(".")[2]):
        return "norm"
    if not matrix:
        return "vector"
    return "attention" if _ATTENTION.search(layer) else "matrix"


register_dynamics(HFTConfig)
register_preset("hft", "full", "Full fine-tuning of a random half of every block", "hft")
