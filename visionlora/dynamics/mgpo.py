r"""MGPO: gradients taken ahead, along the momentum (Chang et al. 2025, arXiv 2502.14538 v3).

    m_t = mu m_(t-1) + (1 - mu) g_t,   e_t = beta e_(t-1) + (1 - beta) |g_t|,   m_0 = 0, e_1 = |g_1|
    eps = rho clamp(|g_t| / e_t, 1/2, 2) m_t / (|m_t| + 1e-12)

and step t + 1 takes its gradients at phi + eps, with phi all trained tensors of the adapters. They
are put back, bit for bit, before the optimiser acts. g are the gradients of the steps, averaged and
unscaled, before clipping. Norms are those of all adapter tensors in one parameter group. The first
step is not moved, and a skipped step leaves no trace.

Derived: the paper describes momentum of the optimiser, an average of the gradient norm and no
second gradient. An own momentum works with every optimiser, and bounds keep one odd batch from
moving far. The published code differs: it moves the frozen weight of each layer, against
`s (m_B A + B m_A)`, by rho over the averaged norm, anew in every micro-batch.

Defaults: rho = 0.05 (0.01 for language models of billions of parameters), mu = 0.9, beta = 0.9.
Cost: one forward and backward, as without it; two copies of phi. Checkpoints hold m and e by name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.perturbed import Displaced, global_norm, move, need_adapters
from visionlora.errors import ConfigError
from visionlora.record import adapter_parameter_owners
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class MGPOConfig(DynamicsConfig):
    """Options of MGPO."""

    name: ClassVar[str] = "mgpo"
    looks_twice: ClassVar[bool] = True

    rho: float = 0.05
    """Length of the move where the gradient has its usual norm."""
    mu: float = 0.9
    """Decay of the momentum."""
    beta: float = 0.9
    """Decay of the average norm."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.rho < 0:
            raise ConfigError(f"mgpo: rho must not be negative, got {self.rho}")
        for key in ("mu", "beta"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ConfigError(f"mgpo: {key} must lie in [0, 1), got {getattr(self, key)}")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "MGPO":
        """Return the dynamics for a run."""
        return MGPO(self, model, optimizer)


@dataclass(frozen=True)
class Track:
    """What is known of one tensor."""

    momentum: Tensor
    usual: float
    """e, of the group that the tensor was in."""
    latest: float
    """|g| of that group in the last step."""


class MGPO(Dynamics):
    """Takes gradients ahead of the parameters; see the module docstring."""

    name = "mgpo"

    def __init__(
        self, config: MGPOConfig, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config = config
        self.model = model
        self._displaced = Displaced()
        self.tracks: dict[str, Track] = {}
        self._pending: dict[str, Track] = {}
        need_adapters(self.name, model, optimizer)

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, nn.Parameter]]:
        """Return the trained adapter tensors of each parameter group by name."""
        owners = adapter_parameter_owners(self.model)
        names = {id(p): name for name, p in self.model.named_parameters() if id(p) in owners}
        return [
            {names[id(p)]: p for p in group["params"] if id(p) in names and p.requires_grad}
            for group in optimizer.param_groups
        ]

    def on_step_begin(self, context: StepContext) -> None:
        """Move the tensors along their momentum."""
        moves: list[tuple[list[nn.Parameter], list[Tensor], float]] = []
        for group in self._groups(context.optimizer):
            known = {name: p for name, p in group.items() if self._knows(name, p)}
            tracks = [self.tracks[name] for name in known]
            if tracks:
                momenta = [item.momentum for item in tracks]
                ratio = tracks[0].latest / max(tracks[0].usual, 1e-12)
                by = self.config.rho * min(max(ratio, 0.5), 2.0) / (global_norm(momenta) + 1e-12)
                moves.append((list(known.values()), momenta, by))
        self._displaced.keep([p for parameters, _, _ in moves for p in parameters])
        for parameters, momenta, by in moves:
            move(parameters, momenta, by)

    def _knows(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether there is a momentum for this tensor, whose shape a rank policy may change."""
        return name in self.tracks and self.tracks[name].momentum.shape == parameter.shape

    def on_backward_end(self, context: StepContext) -> None:
        """Put the tensors back."""
        self._displaced.restore()

    @torch.no_grad()
    def on_grads_ready(self, context: StepContext) -> None:
        """Note what the gradients say."""
        self._pending = {}
        for group in self._groups(context.optimizer):
            found = {name: p for name, p in group.items() if p.grad is not None}
            norm = global_norm([p.grad for p in found.values() if p.grad is not None])
            for name, p in found.items():
                assert p.grad is not None
                if self._knows(name, p):
                    old = self.tracks[name]
                    momentum = torch.lerp(p.grad, old.momentum, self.config.mu)
                    usual = self.config.beta * old.usual + (1 - self.config.beta) * norm
                else:
                    momentum, usual = (1 - self.config.mu) * p.grad, norm
                self._pending[name] = Track(momentum, usual, norm)

    def on_step_end(self, context: StepContext) -> None:
        """Keep what was noted, unless the step was skipped."""
        if not context.skipped:
            self.tracks |= self._pending
        if context.changed:  # a rank policy took parameters out; others may get their names
            here = dict(self.model.named_parameters())
            self.tracks = {name: item for name, item in self.tracks.items() if name in here}

    def on_step_failed(self, context: StepContext) -> None:
        """Put the tensors back."""
        self._displaced.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return momentum and norms by parameter name."""
        return {name: dict(vars(track)) for name, track in self.tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore momentum and norms, on the devices of their parameters."""
        devices = {name: p.device for name, p in self.model.named_parameters()}
        self.tracks = {
            name: Track(entry["momentum"].to(devices[name]), entry["usual"], entry["latest"])
            for name, entry in state.items()
            if name in devices
        }


register_dynamics(MGPOConfig)
register_preset("mgpo", "lora", "LoRA with gradients taken along the momentum", "mgpo")
