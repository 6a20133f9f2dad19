r"""ReLoRA: high rank by restarts of a low-rank pair (Lialin et al. 2023, arXiv 2307.05695).

Every `every` steps what the pair does is put aside for good, and the pair starts again:

    Delta W = s (B_1 A_1 + B_2 A_2 + ... + B A),   then  A redrawn, B = 0

so that k pairs of rank r make a change of rank up to k r, with the optimiser state of one. The
weight is not touched: what is put aside is the constant pair of `visionlora.methods.parts.pair`,
whose rank grows by r with every restart, and with it the cost of the branch and the size of the
file, r (m + n) numbers each. Where that rank would exceed min(m, n) it is compressed, exactly.

At a restart the moments of the pair lose all but their largest entries (a share of `prune`, by the
first moment, 0.99 in the paper; 1 drops the state with its step count), and its learning rate rises
again from zero over `warmup` steps, on top of the schedule. DoRA restarts its pair inside the norm
and keeps its magnitude; SLoRA's middle matrix is redrawn as well.

Derived: `every` is a quarter of the run and `warmup` a tenth of `every` unless they are given (the
paper pre-trains, with restarts after thousands of steps); one mask for all moments of a tensor, so
that no first moment is left above an empty second; the function does not change at a restart, and
dropout is refused, which would act on what was put aside as well.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.places import check_places, trained_places
from visionlora.errors import ConfigError
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.ranks.factors import singular_triples
from visionlora.ranks.optimizer import group_of, move, warm_up
from visionlora.ranks.structure import Place
from visionlora.registry import register_dynamics, register_preset
from visionlora.sites import named_generator

_PAIR = ("A", "N", "B")


@dataclass(frozen=True, kw_only=True)
class ReLoRAConfig(DynamicsConfig):
    """Options of ReLoRA."""

    name: ClassVar[str] = "relora"
    forms: ClassVar[frozenset[Form] | None] = frozenset({"pair", "rescaled", "blocks", "middle"})
    why: ClassVar[str] = "it has no trained pair that could be put aside"
    implies: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    every: int | None = None
    """Steps between two restarts; None: a quarter of the run."""
    warmup: int | None = None
    """Steps over which the rate rises again after a restart; None: a tenth of `every`."""
    prune: float = 0.99
    """Share of the moments of the pair that a restart empties; 1 forgets the step count too."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.every is not None and self.every < 1:
            raise ConfigError(f"relora: every must be at least 1, got {self.every}")
        if self.warmup is not None and self.warmup < 0:
            raise ConfigError(f"relora: warmup must not be negative, got {self.warmup}")
        if not 0.0 <= self.prune <= 1.0:
            raise ConfigError(f"relora: prune must lie in [0, 1], got {self.prune}")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse dropout."""
        dropout = getattr(config, "dropout", 0.0)
        if dropout:
            raise ConfigError(
                f"relora needs dropout=0: it would act on what was put aside too; got {dropout}"
            )

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "ReLoRA":
        """Give the pairs optimiser groups of their own, and return the dynamics."""
        places = trained_places(model)
        check_places(self, places)
        move(optimizer, [item for place in places for item in _pair(place)])
        every = max(1, steps // 4) if self.every is None else self.every
        warmup = every // 10 if self.warmup is None else self.warmup
        return ReLoRA(places, every, warmup, self.prune)


class ReLoRA(Dynamics):
    """Restarts pairs before the first forward of every `every`-th step.

    The parameters stay the same objects, so nothing that holds them has to be renewed. It comes
    first among the dynamics of a step: what the others do to the pair, they do to the new one.
    """

    name = "relora"
    controls = True

    def __init__(self, places: list[Place], every: int, warmup: int, prune: float) -> None:
        self.places = places
        self.every, self.warmup, self.prune = every, warmup, prune
        self.latest = 0
        """Step of the latest restart; a step that failed and is repeated has it behind it."""

    @torch.no_grad()
    def on_step_begin(self, context: StepContext) -> None:
        """Restart, if this is a step to do so."""
        if self._due(context.step) and context.step > self.latest:
            self.latest = context.step
            for place in self.places:
                restart(place, context.step // self.every)
                for parameter in _pair(place):
                    prune_state(context.optimizer, parameter, self.prune)

    def on_step_end(self, context: StepContext) -> None:
        """Let the rates rise again from the next step on, if it restarts."""
        if self._due(context.step + 1):
            for parameter in (item for place in self.places for item in _pair(place)):
                group = group_of(context.optimizer, parameter)
                warm_up(group, start=context.step, steps=self.warmup + 1)

    def _due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the latest restart."""
        return {"latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.latest = state["latest"]


@torch.no_grad()
def restart(place: Place, count: int) -> None:
    """Put the pair of a place aside and begin a new one; the layer does what it did.

    Args:
        place: where; its Delta is a new one afterwards, with the same parameters.
        count: number of the restart, by which the new values are drawn.
    """
    old = cast(PairDelta, place.delta)
    config = cast(PairConfig, old.config)
    up, down = old.trained_pair()
    if old.offset:
        up, down = torch.cat([old.B0, -up], 1), torch.cat([old.A0, down])
    else:
        up = -up
    limit = min(up.shape[0], down.shape[1])
    if up.shape[1] > limit:
        up, down = singular_triples(up.double(), down.double()).pair(limit)
    made = cast(PairDelta, place.build(dataclasses.replace(config, offset=up.shape[1])))
    generator = named_generator(config.seed, f"{place.site.name}:restart {count}")
    made.reset_parameters(place.host.view(place.key), generator)
    made.B0.copy_(up)
    made.A0.copy_(down)
    for name, parameter in old.named_parameters():
        if name in _PAIR:
            parameter.copy_(made.get_parameter(name))
        setattr(made, name, parameter)
    place.put(made)


@torch.no_grad()
def prune_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, share: float) -> None:
    """Empty a share of the moments of a parameter, those where the first is smallest."""
    if share == 1.0:
        optimizer.state.pop(parameter, None)
        return
    moments = [
        value
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    if moments:
        kept = round((1.0 - share) * parameter.numel())
        largest = moments[0].abs().flatten().topk(kept).indices
        mask = torch.zeros_like(moments[0]).flatten()
        mask[largest] = 1.0
        for moment in moments:
            moment.mul_(mask.view_as(moment))


def _pair(place: Place) -> list[nn.Parameter]:
    """Return what a restart draws again, if it trains."""
    named = dict(place.delta.named_parameters())
    return [named[name] for name in _PAIR if name in named and named[name].requires_grad]


register_dynamics(ReLoRAConfig)
register_preset("relora", "lora", "LoRA with restarts, whose rank adds up", "relora")
