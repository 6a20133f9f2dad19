r"""SoRA: sparse low-rank adaptation (Ding et al. 2023, arXiv 2311.11696).

    Delta W = s * B diag(g) A,   s = alpha / r

A: r x in and B: out x r as in LoRA (B = 0, so the change starts at zero), gate g: r from N(0, 1).
The gate has an L1 term `l1 * mean|g|` in the loss, and after every step of the optimiser it goes
through the proximal map of xi |g|:

    g <- sign(g) * max(|g| - xi, 0)

Gates that reach zero switch their rank off; one step of more than xi switches it on again. xi is
constant as in the paper's main runs, or multiplied by the learning rate (`times_lr`), as a proximal
gradient step has it. `legacy` thresholds as the published code does, in three passes, after which
everything that lands below xi is zero too: |g| < 2 xi becomes 0, while |g| = xi survives.

Schedule: with `stages` > 1, xi goes from `xi` to `xi_max` in that many values; the first one is
kept for a share `first` of the run, the others share the rest, and step, loss and open gates at the
end of each are recorded.

Trained: r (out + in + 1) scalars a site; gates have their own optimiser group, without weight
decay. Merge: W + Delta W. At the end of training g goes into A, ranks with g = 0 are dropped, and
the site is plain LoRA of the rank that is left.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.dynamics.base import StepContext
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Group, Shared, reset_zero_pair
from visionlora.ranks.controller import Controller
from visionlora.ranks.optimizer import group_of, move
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class SoRAConfig(LowRankConfig):
    """Options of SoRA."""

    method: ClassVar[str] = "sora"

    alpha: float | None = 16.0
    """Numerator of the scale; None means `rank`."""
    xi: float = 1e-4
    """Threshold of the proximal map."""
    l1: float = 0.1
    """Weight of `mean|g|` in the loss."""
    times_lr: bool = False
    """Multiply the threshold by the learning rate of the step."""
    legacy: bool = False
    """Threshold in three passes, as the published code does."""
    stages: int = 1
    """Number of values of xi, from `xi` to `xi_max`."""
    xi_max: float | None = None
    """Last value of xi."""
    schedule: Literal["linear", "log_linear", "exp_linear"] = "linear"
    """How the values are spaced: evenly, evenly in exp(xi), evenly in log(xi)."""
    first: float = 0.5
    """Share of the run that has the first value."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("xi", "l1"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sora: {name} must not be negative, got {getattr(self, name)}")
        if self.stages < 1:
            raise ConfigError(f"sora: stages must be at least 1, got {self.stages}")
        if self.stages > 1 and (self.xi_max is None or not 0 < self.xi <= self.xi_max):
            raise ConfigError(
                f"sora: {self.stages} stages need 0 < xi <= xi_max, got {self.xi} and {self.xi_max}"
            )
        if not 0 < self.first < 1:
            raise ConfigError(f"sora: first must lie between 0 and 1, got {self.first}")

    def meaning(self) -> dict[str, Any]:
        """Return rank and scale: the rest matters only in training."""
        return {"method": self.method, "rank": self.rank, "scale": self.scale}

    def thresholds(self) -> list[float]:
        """Return the values of xi, one per stage."""
        if self.stages == 1:
            return [self.xi]
        assert self.xi_max is not None
        there, back = _SPACING[self.schedule]
        low, high = there(self.xi), there(self.xi_max)
        inner = [back(low + (high - low) * i / (self.stages - 1)) for i in range(1, self.stages)]
        return [self.xi, *inner[:-1], self.xi_max]


_SPACING: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float),
    "log_linear": (math.exp, math.log),
    "exp_linear": (math.log, math.exp),
}


class SoRA(Delta):
    """A factor pair with a gate between the two."""

    groups: ClassVar[dict[str, Group]] = {"g": Group(decay=False)}

    def __init__(self, config: SoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.kind = site.kind
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.g = nn.Parameter(torch.empty(config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the factors as LoRA does, and the gate from N(0, 1)."""
        reset_zero_pair(self.A, self.B, self.kind, generator)
        self.g.copy_(torch.empty(self.g.shape).normal_(generator=generator))

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, diag(g) A)`."""
        return self.B, self.g[:, None] * self.A

    def kept(self) -> Bool[Tensor, " rank"]:
        """Return which gates are open."""
        return self.g.detach() != 0

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in + 1)."""
        return int(config.rank * (out_features + in_features + 1))


@torch.no_grad()
def shrink(gate: Tensor, xi: float, legacy: bool = False) -> Tensor:
    """Return `argmin_z (z - g)^2 / 2 + xi |z|`, or what the published code makes of it."""
    shrunk = gate.sign() * (gate.abs() - xi).clamp_min(0)
    if not legacy:
        return shrunk
    passed = torch.where(gate.abs() > xi, shrunk, gate)
    return passed.masked_fill(passed.abs() < xi, 0.0)


class SoRAController(Controller):
    """Keeps the gates apart in the optimiser, penalises them, and shrinks them after every step."""

    def begin(self) -> None:
        """Read the stages and take weight decay off the gates."""
        config = self.places[0].delta.config
        assert isinstance(config, SoRAConfig)
        self.config: SoRAConfig = config
        self.values = self.config.thresholds()
        self.history: list[dict[str, float]] = []
        """Step, xi, loss and number of open gates at the end of every stage."""
        move(self.optimizer, self.gates, weight_decay=0.0)

    @property
    def gates(self) -> list[nn.Parameter]:
        """All gates, in module order."""
        return [place.delta.get_parameter("g") for place in self.places]

    def stage(self, step: int) -> int:
        """Return which value of xi applies to a step."""
        begin = int(self.config.first * self.steps)
        if step < begin or len(self.values) == 1:
            return 0
        rest = (step - begin) * (len(self.values) - 1) // max(1, self.steps - begin)
        return min(1 + rest, len(self.values) - 1)

    def penalty(self, context: StepContext) -> Tensor | None:
        """Return `l1 * mean|g|` over all gates."""
        if not self.config.l1:
            return None
        return self.config.l1 * torch.cat([gate.abs() for gate in self.gates]).mean()

    @torch.no_grad()
    def on_step_end(self, context: StepContext) -> None:
        """Shrink the gates, unless the step was given up."""
        xi = self.values[self.stage(context.step)]
        if not context.skipped:
            for gate in self.gates:
                rate = group_of(self.optimizer, gate)["lr"] if self.config.times_lr else 1.0
                gate.copy_(shrink(gate, rate * xi, self.config.legacy))
        last = context.step + 1 == self.steps
        if last or self.stage(context.step + 1) != self.stage(context.step):
            open_gates = sum(int((gate != 0).sum()) for gate in self.gates)
            loss = math.nan if context.loss is None else context.loss
            self.history.append(
                {"step": context.step + 1, "xi": xi, "loss": loss, "open": open_gates}
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the stages."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the record of the stages."""
        self.history = state["history"]


register(SoRAConfig, SoRA, controller=SoRAController)
