r"""LoRA-GGPO: noise sized by weight and gradient (Chang et al. 2025, arXiv 2502.14538 v1).

In the forwards of a training step, per site with frozen weight W: m x n and change Delta W,

    y = x (W + E)^T + change,   E_ij = (sigma p_i + beta q_i^2) / sqrt(m) * N(0, 1)
    p_i^2 = |W_i|^2 + |Delta W_i|^2
    q_i   = |G_i|,   G = sum_t dDelta W / dt * dL/dt = s (B gA + gB A) for a pair

p and q are norms of rows at the end of the step before, from averaged, unscaled and clipped
gradients with the scale s inside. G is what one unit of descent would take off the change
(`visionlora.dynamics.slope`): a product of rank 2 r whose rows are measured without forming it, or
the gradient itself for whole matrices and single entries. DoRA's noise is that of V = W + s B A,
inside its norm. The first step, and every evaluation, is free of noise. E is a constant of the
backward, and x E^T is part of the graph.

W itself is moved for the duration of the forwards and backwards, and put back from a copy, bit for
bit, before anything else looks at it. So all layers, row slices, micro-batches, checkpointed
regions and both passes of SAM and GLAD see the same E. It is drawn for seed, step and site, so that
all processes and a resumed run agree.

Defaults: sigma = 0.03, beta = 0.01. `row_exact=False` takes the mean of |W_i| for all rows, as the
reference code does. `norm="fan_in"` divides by sqrt(n), because noise outgrows wide rows otherwise:
|E| / |W| is about sigma sqrt(n / m) (derived). The reference code loses s, and cuts E out of the
gradient of x; neither is repeated. Noise makes gradients larger and they, squared, make noise:
where they are not small against 1, clip them.

Cost: a normal number and three copies per entry of W and step, r^2 (m + n) for the norms, memory
for a copy of the adapted weights; p and q, 2 m numbers a site, in checkpoints.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.perturbed import Displaced
from visionlora.dynamics.slope import change_and_gradient
from visionlora.errors import ConfigError
from visionlora.hosts.base import parameter_name, rows_of, stored
from visionlora.ranks.structure import Place, places_of
from visionlora.registry import register_dynamics, register_preset
from visionlora.sites import named_generator


@dataclass(frozen=True, kw_only=True)
class GGPOConfig(DynamicsConfig):
    """Options of GGPO."""

    name: ClassVar[str] = "ggpo"
    forms: ClassVar[frozenset[Form] | None] = frozenset(
        {"pair", "rescaled", "blocks", "middle", "core", "frozen-down", "sparse", "full"}
    )
    why: ClassVar[str] = (
        "its noise is sized by what pairs, entries and whole matrices have: a slope"
    )

    sigma: float = 0.03
    """Noise per norm of the weight's row."""
    beta: float = 0.01
    """Noise per squared norm of the gradient's row."""
    row_exact: bool = True
    """Use the norm of every row of W instead of their mean."""
    norm: Literal["fan_out", "fan_in"] = "fan_out"
    """Which dimension of W the noise is divided by the root of."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for key in ("sigma", "beta"):
            if getattr(self, key) < 0:
                raise ConfigError(f"ggpo: {key} must not be negative, got {getattr(self, key)}")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "GGPO":
        """Return the dynamics for the trained sites of the active adapters."""
        return GGPO(self, model)


class GGPO(Dynamics):
    """Adds noise to the frozen weights of trained sites; see the module docstring."""

    name = "ggpo"

    def __init__(self, config: GGPOConfig, model: nn.Module) -> None:
        self.config = config
        self.model = model
        self._displaced = Displaced()
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}
        """p and q of every site, from the last applied step."""
        self._latest: dict[str, tuple[Tensor, Tensor]] = {}
        self._weight_norms: dict[str, Tensor] = {}
        self._gradients: dict[str, dict[str, Tensor]] = {}
        _check_weights(self._places())

    def _places(self) -> list[Place]:
        return [
            place
            for place in places_of(self.model)
            if place.active and any(item.requires_grad for item in place.delta.parameters())
        ]

    @torch.no_grad()
    def on_step_begin(self, context: StepContext) -> None:
        """Add the noise."""
        places = [place for place in self._places() if place.name in self._norms]
        weights = [_weight(place) for place in places]
        for place, weight, kept in zip(places, weights, self._displaced.keep(weights), strict=True):
            seed = named_generator(self.config.seed, f"{context.step}:{place.name}").initial_seed()
            weight.normal_(generator=torch.Generator(weight.device).manual_seed(seed))
            scale = _as_rows(self.deviations(place), weight, place)
            torch.addcmul(kept, weight, scale, out=weight)

    def deviations(self, place: Place) -> Float[Tensor, " out"]:
        """Return the standard deviation of the noise in each row of a site."""
        p, q = self._norms[place.name]
        site = place.site
        size = site.out_features if self.config.norm == "fan_out" else site.in_features
        return (self.config.sigma * p + self.config.beta * q.square()) / size**0.5

    def on_backward_end(self, context: StepContext) -> None:
        """Take the noise away."""
        self._displaced.restore()

    def on_grads_ready(self, context: StepContext) -> None:
        """Take hold of the gradients, which others may keep to themselves after clipping."""
        self._gradients = {
            place.name: {
                name: item.grad
                for name, item in place.delta.named_parameters()
                if item.grad is not None
            }
            for place in self._places()
        }

    @torch.no_grad()
    def on_grads_clipped(self, context: StepContext) -> None:
        """Measure the rows of weights, changes and gradients."""
        self._latest = {}
        for place in self._places():
            gradients = self._gradients.get(place.name)
            if gradients:
                strength = place.host.state.strengths[place.adapter]
                found = change_and_gradient(place.delta, gradients)
                change, gradient = (strength * norms for norms in found)
                self._latest[place.name] = torch.hypot(self._of_weight(place), change), gradient
        self._gradients = {}

    def _of_weight(self, place: Place) -> Float[Tensor, " out"]:
        """Return the row norms of the frozen weight, taken once."""
        if place.name not in self._weight_norms:
            norms = place.host.view(place.key).detach().norm(dim=1)
            norms = norms.to(torch.promote_types(norms.dtype, torch.float32))
            exact = self.config.row_exact
            self._weight_norms[place.name] = norms if exact else norms.mean().expand_as(norms)
        return self._weight_norms[place.name]

    def on_step_end(self, context: StepContext) -> None:
        """Keep what was measured, unless the step was skipped."""
        if not context.skipped:
            self._norms |= self._latest

    def on_step_failed(self, context: StepContext) -> None:
        """Take the noise away."""
        self._displaced.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return p and q by site."""
        return {name: {"p": p, "q": q} for name, (p, q) in self._norms.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore p and q, on the devices of their sites."""
        devices = {place.name: _weight(place).device for place in self._places()}
        self._norms = {
            name: (entry["p"].to(devices[name]), entry["q"].to(devices[name]))
            for name, entry in state.items()
            if name in devices
        }


def _weight(place: Place) -> Tensor:
    """Return the stored rows of a site's frozen weight."""
    host = place.host
    return rows_of(stored(host, parameter_name(host, place.key)).detach(), place.site.rows)


def _as_rows(values: Float[Tensor, " out"], weight: Tensor, place: Place) -> Tensor:
    """Return a value per output so that it broadcasts over the stored rows."""
    values = values.to(weight.dtype)
    if place.site.kind == "embedding":
        return values
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def _check_weights(places: list[Place]) -> None:
    """Refuse weights that cannot be moved, or that two sites would move at once."""
    if not places:
        raise ConfigError("ggpo sizes noise by the gradients of adapters, but none is trained")
    taken: list[tuple[int, int, int, str]] = []
    for place in places:
        weight = stored(place.host, parameter_name(place.host, place.key))
        if weight.is_meta or type(weight.data) is not Tensor:
            raise ConfigError(
                f"ggpo cannot add noise to {place.name}, whose weight is "
                f"{'on the meta device' if weight.is_meta else type(weight.data).__name__}; it "
                "needs plain floating-point weights"
            )
        if weight.requires_grad:
            raise ConfigError(
                f"ggpo adds noise to frozen weights, but the weight of {place.name} is trained"
            )
        start, stop = place.site.rows or (0, weight.shape[0])
        for key, first, last, name in taken:
            if key == id(weight) and first < stop and start < last:
                raise ConfigError(
                    f"ggpo cannot size the noise of one weight by two changes: {name} and "
                    f"{place.name} share rows"
                )
        taken.append((id(weight), start, stop, place.name))


register_dynamics(GGPOConfig)
register_preset("ggpo", "lora", "LoRA under noise on the frozen weights", "ggpo")
