r"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv 2303.10512).

    Delta W = s * P diag(E) Q,   s = alpha / (r + 1e-5)

P: out x r, Q: r x in from N(0, 0.02^2), E: r = 0, so the change starts at zero. P and Q are kept
near orthonormal by a term in the loss, `orthogonality` times the mean over all P and Q of the
Frobenius norm of `P^T P - I` or `Q Q^T - I`: then E are the singular values, and setting one to
zero removes a rank.

Importance of an entry w: I = |w * dL/dw|, smoothed, times its smoothed uncertainty:

    I' <- beta1 I' + (1 - beta1) I,   U' <- beta2 U' + (1 - beta2) |I - I'|,   s(w) = I' U'

and of a triple: s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij). Budget of a run of T steps with n sites:
n r until step t_i = `warmup` T; then, with t_f = `final` T,

    b(t) = n target + n (r - target) (1 - (t - t_i) / (T - t_i - t_f))^3

Every `interval` steps the threshold is that of the b best triples of all sites, and E of the others
is set to zero; they go on training and may come back. For the last t_f steps the choice is fixed.
The scale does not follow the rank.

Trained: r (out + in + 1) scalars a site. Merge: W + Delta W. At the end of training E goes into Q,
masked ranks are dropped, and the site is plain LoRA of the rank that is left.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.dynamics.base import StepContext
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared
from visionlora.ranks.controller import Controller
from visionlora.ranks.importance import Importance, orthogonality
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Options of AdaLoRA."""

    method: ClassVar[str] = "adalora"

    rank: int = 12
    """Rank r of every site at the beginning."""
    target: float = 8.0
    """Mean rank of the sites at the end."""
    alpha: float = 8.0
    """Numerator of the scale."""
    dropout: float = 0.0
    """Probability of dropping an input entry of the adapter branch while training."""
    orthogonality: float = 0.5
    """Weight of the orthogonality term."""
    beta1: float = 0.85
    """Smoothing of the importance."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    warmup: float = 0.1
    """Share of the run before the budget falls."""
    final: float = 0.3
    """Share of the run after the choice is fixed."""
    interval: int = 10
    """Steps between two choices."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.target <= 0:
            raise ConfigError(f"adalora: target must be positive, got {self.target}")
        for name in ("dropout", "beta1", "beta2", "warmup", "final"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"adalora: {name} must lie in [0, 1), got {getattr(self, name)}")
        if self.warmup + self.final >= 1:
            raise ConfigError(
                f"adalora: warmup {self.warmup} and final {self.final} leave no step to choose in"
            )
        if self.interval < 1:
            raise ConfigError(f"adalora: interval must be at least 1, got {self.interval}")
        if self.orthogonality < 0:
            raise ConfigError(
                f"adalora: orthogonality must not be negative, got {self.orthogonality}"
            )

    @property
    def scale(self) -> float:
        """The constant s."""
        return self.alpha / (self.rank + 1e-5)

    def meaning(self) -> dict[str, Any]:
        """Return rank and scale: the rest matters only in training."""
        return {"method": self.method, "rank": self.rank, "scale": self.scale}

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the site cannot have."""
        check_rank(self.method, self.rank, site)


class AdaLoRA(Delta):
    """A triple of singular vectors and values."""

    def __init__(self, config: AdaLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.P = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.E = nn.Parameter(torch.empty(config.rank))
        self.Q = nn.Parameter(torch.empty(config.rank, site.in_features))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw P and Q, set E to zero."""
        for part in (self.P, self.Q):
            part.copy_(torch.empty(part.shape).normal_(0.0, 0.02, generator=generator))
        self.E.zero_()

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(P, diag(E) Q)`."""
        return self.P, self.E[:, None] * self.Q

    def kept(self) -> Bool[Tensor, " rank"]:
        """Return which singular values are not masked."""
        return self.E.detach() != 0

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in + 1)."""
        return int(config.rank * (out_features + in_features + 1))


class AdaLoRAController(Controller):
    """Scores the triples of all sites in every step and masks those beyond the budget."""

    def begin(self) -> None:
        """Read the budget and refuse one that ranks would have to be added for."""
        config = self.places[0].delta.config
        assert isinstance(config, AdaLoRAConfig)
        self.config: AdaLoRAConfig = config
        self.start = sum(place.delta.get_parameter("E").numel() for place in self.places)
        self.target = max(1, round(config.target * len(self.places)))
        if self.target > self.start:
            raise ConfigError(
                f"adalora: the target of {config.target:g} ranks a site is larger than the "
                f"{self.start / len(self.places):g} that training begins with"
            )
        self.first = int(config.warmup * self.steps)
        self.last = min(self.steps - int(config.final * self.steps), self.steps - 1)
        self.importance = Importance(config.beta1, config.beta2)
        self.masks: dict[str, Tensor] = {}
        """Masked ranks of every site since the last choice."""
        self.fixed = False
        """Whether the last choice was made."""
        self._chosen = False

    def penalty(self, context: StepContext) -> Tensor | None:
        """Return the orthogonality term."""
        if not self.config.orthogonality:
            return None
        deltas = [place.delta for place in self.places]
        terms = [orthogonality(delta.get_parameter("P").t()) for delta in deltas]
        terms += [orthogonality(delta.get_parameter("Q")) for delta in deltas]
        return self.config.orthogonality * torch.stack(terms).mean()

    def budget(self, step: int) -> int:
        """Return how many triples of all sites are kept after a step."""
        if step <= self.first:
            return self.start
        if step >= self.last:
            return self.target
        left = 1 - (step - self.first) / (self.last - self.first)
        return int(self.target + (self.start - self.target) * left**3)

    def due(self, step: int) -> bool:
        """Return whether the masks are chosen anew in a step."""
        if step >= self.last:
            return not self.fixed
        return step > self.first and step % self.config.interval == 0

    @torch.no_grad()
    def on_grads_ready(self, context: StepContext) -> None:
        """Update the importance of every entry, and choose if it is time."""
        if context.step < self.last or not self.importance.measured:
            for place in self.places:
                self.importance.update(place.name, dict(place.delta.named_parameters()))
        self._chosen = self.due(context.step)
        if self._chosen:
            self.choose(self.budget(context.step))
            self.fixed = context.step >= self.last

    def scores(self) -> dict[str, Tensor]:
        """Return the importance of every triple, by site."""
        return {
            place.name: self.importance.score(place.name, "E")
            + self.importance.score(place.name, "P").mean(0)
            + self.importance.score(place.name, "Q").mean(1)
            for place in self.places
        }

    def choose(self, budget: int) -> None:
        """Mask all triples but the `budget` most important ones."""
        scores = self.scores()
        if budget >= self.start:
            self.masks = {}
            return
        together = torch.cat(list(scores.values()))
        threshold = together.kthvalue(self.start - budget).values
        self.masks = {name: score <= threshold for name, score in scores.items()}

    @torch.no_grad()
    def on_step_end(self, context: StepContext) -> None:
        """Set the masked singular values to zero: once per choice, or to the end of the run."""
        if self._chosen or self.fixed:
            for place in self.places:
                if place.name in self.masks:
                    place.delta.get_parameter("E").masked_fill_(self.masks[place.name], 0.0)
        self._chosen = False

    def state_dict(self) -> dict[str, Any]:
        """Return the smoothed importance and the masks."""
        return {
            "importance": self.importance.state_dict(),
            "masks": dict(self.masks),
            "fixed": self.fixed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore importance and masks."""
        devices = {place.name: place.delta.get_parameter("E").device for place in self.places}
        self.importance.load_state_dict(state["importance"], devices)
        self.masks = {name: mask.to(devices[name]) for name, mask in state["masks"].items()}
        self.fixed = state["fixed"]


register(AdaLoRAConfig, AdaLoRA, controller=AdaLoRAController)
