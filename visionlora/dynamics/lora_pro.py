r"""LoRA-Pro: factor pairs move as full fine-tuning would (Wang et al. 2024, arXiv 2407.18242).

    E  = P_B g + (I - P_B) g P_A            equivalent gradient, from gA and gB only
    M  = b1 M + (1 - b1) E,   V = b2 V + (1 - b2) E^2,   u = M^ / (sqrt(V^) + eps)
    A -= lr GA,   B -= lr GB                the best step of the pair along u

so that W moves by `-lr (P_B u + (I - P_B) u P_A)`: AdamW on the weight, seen through the pair
(`visionlora.dynamics.equivalent` has the algebra and the choice of X). lr is therefore a rate of
full fine-tuning (start at 1e-5 to 1e-4 for a ViT), not one of LoRA. At full rank it is AdamW on W.

`moments="full"` is the paper's method. Its state is as large as that of AdamW on every adapted
weight, 2 m n float32 numbers a site, however few are trained. `moments="factor"` keeps the moments
of GA and GB instead, 2 r (m + n) numbers, which is not the paper's method. `moments="none"` is
gradient descent.

Weight decay of the optimiser's group acts decoupled on the change: `wd * Delta W` is added to u
(derived; the paper has none); with factor moments on A and B, as in AdamW.

From B = 0 the second step moves A by as much as A is large whatever lr, because `(B^T B)^-1` is
about 1 / lr^2; `warm_b_steps` holds A during the first steps (derived, default 0).

The optimiser of the run keeps heads, biases and norms, and gives the pairs their rate; gradients of
the pairs are taken away from it after accumulation, averaging and clipping. Block-LoRA's arms share
the step of their sum evenly. Time per site: O(m n r + r^3) and one pass over the moments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.equivalent import Choice, Pair
from visionlora.dynamics.moments import Moments
from visionlora.dynamics.places import check_places, trained_places
from visionlora.errors import ConfigError
from visionlora.methods.parts.pair import PairDelta
from visionlora.ranks.optimizer import Group, group_of
from visionlora.ranks.structure import Place
from visionlora.registry import register_dynamics, register_preset

_CONFLICTS = {
    "lora+": "another rate for B than for A breaks the step of the weight that is solved for",
    "allora": "it needs the true gradient, which ALLoRA rescales",
}


@dataclass(frozen=True, kw_only=True)
class LoRAProConfig(DynamicsConfig):
    """Options of LoRA-Pro."""

    name: ClassVar[str] = "lora-pro"
    forms: ClassVar[frozenset[Form] | None] = frozenset({"pair", "blocks"})
    why: ClassVar[str] = (
        "it solves for the step of two trained factors whose product is the change; for frozen "
        "factors there is 'projected'"
    )
    implies: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    moments: Literal["full", "factor", "none"] = "full"
    """Whose moments are kept: the equivalent gradient's, the factors', or none (plain descent)."""
    choice: Choice = "sylvester"
    """How the step is shared out between A and B."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    ridge: float = 1e-6
    """Regularisation of the Gram matrices, relative to their mean eigenvalue."""
    warm_b_steps: int = 0
    """Number of first steps in which A is held."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for key in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ConfigError(f"lora-pro: {key} must lie in [0, 1), got {getattr(self, key)}")
        for key in ("eps", "ridge", "warm_b_steps"):
            if getattr(self, key) < 0:
                raise ConfigError(f"lora-pro: {key} must not be negative, got {getattr(self, key)}")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse options under which the gradients are not those of the pair, and such dynamics."""
        if getattr(config, "layout", "") == "grid":
            raise ConfigError(
                "lora-pro cannot serve block-lora in layout 'grid', whose down-matrix is repeated; "
                "use layout 'rank'"
            )
        if getattr(config, "dropout", 0.0):
            raise ConfigError(
                "lora-pro needs dropout=0: gradients of the pair are those of the weight only "
                f"without it; got {config.dropout}"  # type: ignore[attr-defined]
            )
        if not getattr(config, "scale", 1.0):
            raise ConfigError("lora-pro needs an alpha other than 0: it divides by the scale")
        for other in others:
            if other.looks_twice:
                raise ConfigError(
                    f"lora-pro cannot be combined with {other.name}, which takes the gradient at "
                    "another point than the pair that it is projected with"
                )
            if other.name in _CONFLICTS:
                why = _CONFLICTS[other.name]
                raise ConfigError(f"lora-pro cannot be combined with {other.name}: {why}")

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "LoRAPro":
        """Return the dynamics for the trained pairs of the active adapters."""
        return LoRAPro(self, model, optimizer)


@dataclass(frozen=True)
class _Site:
    """A pair whose gradients were taken from the optimiser."""

    key: str
    delta: PairDelta
    scale: float
    held: bool
    up: Tensor
    down: Tensor
    grad_up: Tensor
    grad_down: Tensor


class LoRAPro(Dynamics):
    """Moves the factor pairs of a model; see the module docstring."""

    name = "lora-pro"

    def __init__(
        self, config: LoRAProConfig, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config = config
        self.places = {f"{item.adapter}:{item.name}": item for item in trained_places(model)}
        check_places(config, self.places.values())
        for place in self.places.values():
            _check_rates(place, optimizer)
        self.steps: dict[str, int] = {}
        self.moments = Moments(config.beta1, config.beta2, config.eps)
        self._taken: list[_Site] = []

    def on_grads_clipped(self, context: StepContext) -> None:
        """Take the gradients of the pairs, so that the optimiser leaves them alone."""
        self._taken = []
        for key, place in self.places.items():
            delta = cast(PairDelta, place.delta)
            scale = delta.scale * place.host.state.strengths[place.adapter]
            if delta.A.grad is not None and delta.B.grad is not None and scale:
                held = self.steps.get(key, 0) < self.config.warm_b_steps
                self._taken.append(_taken(key, delta, scale, held))
                delta.A.grad = delta.B.grad = None

    @torch.no_grad()
    def on_step_end(self, context: StepContext) -> None:
        """Move the pairs, unless the step was skipped."""
        taken, self._taken = self._taken, []
        if context.skipped:
            return
        groups = {id(p): group for group in context.optimizer.param_groups for p in group["params"]}
        stacks: dict[Any, list[_Site]] = {}
        for site in taken:
            like = (site.up.shape, site.down.shape, site.up.dtype, site.up.device)
            stacks.setdefault((like, site.scale, site.held), []).append(site)
        for sites in stacks.values():
            self._move(sites, groups)

    def on_step_failed(self, context: StepContext) -> None:
        """Forget the gradients of a step that did not end."""
        self._taken = []

    def _move(self, sites: list[_Site], groups: dict[int, Group]) -> None:
        """Move pairs of one shape and scale."""
        config, scale = self.config, sites[0].scale
        up, down, grad_up, grad_down = (
            torch.stack([getattr(site, name) for site in sites])
            for name in ("up", "down", "grad_up", "grad_down")
        )
        pair = Pair.of(up, down, scale, config.ridge)
        if sites[0].held:
            pair = pair.with_down_held()
        for site in sites:
            self.steps[site.key] = self.steps.get(site.key, 0) + 1
        decays = [groups[id(site.delta.B)].get("weight_decay", 0.0) for site in sites]
        if config.moments == "full":
            left, right = pair.equivalent(*pair.optimal(grad_up, grad_down, "zero"))
            for i, site in enumerate(sites):
                thin = self.moments.through_pair(site.key, left[i], right[i], up[i], down[i])
                grad_up[i], grad_down[i] = scale * thin[0], scale * thin[1]
        if config.moments != "factor":
            for i, (site, decay) in enumerate(zip(sites, decays, strict=True)):
                if decay:
                    own_up, own_down = (item.to(up.dtype) for item in site.delta.inner_pair())
                    grad_up[i] += decay * scale**2 * own_up @ (own_down @ down[i].t())
                    grad_down[i] += decay * scale**2 * (up[i].t() @ own_up) @ own_down
        new_up, new_down = pair.optimal(grad_up, grad_down, config.choice)
        if config.moments == "factor":
            for i, (site, decay) in enumerate(zip(sites, decays, strict=True)):
                for name, step, factor in (("B", new_up, up), ("A", new_down, down)):
                    direction = self.moments.of(f"{site.key}|{name}", step[i])
                    step[i] = direction + decay * factor[i]
        for i, site in enumerate(sites):
            delta = site.delta
            rates = [groups[id(item)]["lr"] for item in (delta.A, delta.B)]
            delta.A.sub_(rates[0] * new_down[i])
            arms = delta.B.unflatten(1, (delta.arms, -1))
            arms.sub_(rates[1] / delta.arms * new_up[i][:, None])

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and moments by site."""
        return {"steps": dict(self.steps), "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on the devices of the sites.

        Raises:
            ConfigError: a site of the state is not in the model.
        """
        unknown = sorted(set(state["steps"]) - set(self.places))
        if unknown:
            raise ConfigError(f"lora-pro: the saved state is of another model: {unknown[0]}")
        self.steps = dict(state["steps"])
        self.moments.load_state_dict(state["moments"], self._device)

    def _device(self, name: str) -> torch.device:
        return cast(PairDelta, self.places[name.split("|")[0]].delta).A.device


def _taken(key: str, delta: PairDelta, scale: float, held: bool) -> _Site:
    """Return a pair with its gradients, in at least float32; arms are added up."""
    assert delta.A.grad is not None
    assert delta.B.grad is not None
    up, down = delta.trained_pair()
    grad_up = delta.B.grad.unflatten(1, (delta.arms, -1)).mean(1)
    wide = torch.promote_types(up.dtype, torch.float32)
    tensors = (item.detach().to(wide) for item in (up, down, grad_up, delta.A.grad))
    return _Site(key, delta, scale, held, *tensors)


def _check_rates(place: Place, optimizer: torch.optim.Optimizer) -> None:
    """Refuse factors that learn at different rates."""
    delta = cast(PairDelta, place.delta)
    rates = [group_of(optimizer, item)["lr"] for item in (delta.A, delta.B)]
    if rates[0] != rates[1]:
        raise ConfigError(
            f"lora-pro needs one learning rate for A and B, got {rates} at {place.name}"
        )


register_dynamics(LoRAProConfig)
register_preset("lora-pro", "lora", "LoRA whose steps are those of full fine-tuning", "lora-pro")
