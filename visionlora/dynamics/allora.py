r"""ALLoRA: a learning rate for every row of the change (Huang et al. 2024, arXiv 2410.09692).

    dL/dz_i <- a_i dL/dz_i,   a_i = 1 / sqrt(|(B A)_i| + 1 / eta^2),   z = B A x

in the backward only, so with `G = dL/d(B A)`, out x in, the gradients become

    gB = diag(a) G A^T,   gA = B^T diag(a) G

A row that has hardly moved learns fastest: at B = 0 every a_i is eta, and a_i falls as its row
grows. `a` is a constant of the gradient, taken anew in every forward from the norms of the rows,
without the product: `|(B A)_i|^2 = b_i (A A^T) b_i`. There is no alpha (s = 1) and no dropout; eta,
2 by default, is what is left to tune.

Derived, as no reference code was found: the exponent and the place of eta above. The gradient to x
is the true one, so that layers below do not feel the gains of layers above;
`scale_input_grad=True` passes `a` on. For SLoRA B stands for `B N`, for Block-LoRA for the sum of
the arms, and where a constant pair is taken off the change, its rows are those of the difference.

`where="update"` (derived): Adam divides a constant factor of a row of gB out again, so of `a` only
its changes over time and what it does to gA survive. Here the gradients are left alone, and what
the optimiser did to B, weight decay included, is scaled with `a` from before the step:

    B = B_old + a (B_new - B_old)

Cost: T r out multiply-adds more per linear layer in the backward, r^2 (out + in) for the norms, no
state; elsewhere see `visionlora.ops.row_gain`. With `where="update"` a copy of B during the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.config import DynamicsConfig
from visionlora.dynamics.places import check_places, trained_places
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta
from visionlora.ops import row_norms
from visionlora.registry import register_dynamics, register_preset


@dataclass(frozen=True, kw_only=True)
class ALLoRAConfig(DynamicsConfig):
    """Options of ALLoRA."""

    name: ClassVar[str] = "allora"
    forms: ClassVar[frozenset[Form]] = frozenset({"pair", "blocks", "middle"})
    why: ClassVar[str] = "its gains are those of the rows of a plain product B A"
    implies: ClassVar[dict[str, object]] = {"alpha": None, "scaling": "standard", "dropout": 0.0}

    eta: float = 2.0
    """Gain of a row that is zero."""
    where: Literal["grad", "update"] = "grad"
    """`grad`: scale the gradients of both factors. `update`: scale the step of B."""
    scale_input_grad: bool = False
    """Pass the scaled gradient on to the input as well."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.eta > 0:
            raise ConfigError(f"allora: eta must be positive, got {self.eta}")
        if self.scale_input_grad and self.where == "update":
            raise ConfigError("allora: scale_input_grad needs where='grad', which scales gradients")

    def check(self, config: AdapterConfig, others: Sequence[DynamicsConfig]) -> None:
        """Refuse a scale, dropout, and dynamics that set the rates of the same rows."""
        scale = float(getattr(config, "scale", 1.0))
        if scale != 1.0:
            raise ConfigError(
                f"allora has no scale, its eta takes that place: {config.method} must have s = 1 "
                f"(alpha=None with scaling='standard'), got s = {scale:g}"
            )
        dropout = float(getattr(config, "dropout", 0.0))
        if dropout:
            raise ConfigError(f"allora takes the place of dropout: set dropout=0, got {dropout:g}")
        for other in others:
            if other.name == "lora-pro":
                raise ConfigError(
                    "allora scales the gradient that lora-pro takes for the true one; leave one out"
                )
            if other.name == "lora+":
                raise ConfigError(
                    "allora and lora+ both set the rate of B against that of A; leave one out"
                )

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> "ALLoRA":
        """Return the dynamics of one run over the trained adapters of a model.

        Raises:
            ConfigError: no adapter trains, one is unsuitable, or `scale_input_grad` is set with a
                layer whose weight is read directly.
        """
        places = trained_places(model)
        check_places(self, places)
        for place in places:
            if self.scale_input_grad and place.host.state.mode == "dense":
                raise ConfigError(
                    f"allora: scale_input_grad cannot act on {place.path}, whose weight is read "
                    "directly (dense mode)"
                )
        return ALLoRA(self, model)


@dataclass(frozen=True)
class RowGain:
    """The gain `a` of every row; it holds no tensor, so models that have it can be copied."""

    eta: float
    to_input: bool

    @torch.no_grad()
    def __call__(
        self, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank folded"], fold: int
    ) -> Float[Tensor, " out"]:
        """Return a for the change `up @ [down ... down]`."""
        return (row_norms(up, down, fold) + self.eta**-2).rsqrt()


class ALLoRA(Dynamics):
    """Gives the Deltas their gain from the begin of every step to its end, or scales B's step."""

    name = "allora"

    def __init__(self, options: ALLoRAConfig, model: nn.Module) -> None:
        self.options = options
        self.model = model
        self.gain = RowGain(options.eta, options.scale_input_grad)
        self._governed: list[Delta] = []
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def on_step_begin(self, context: StepContext) -> None:
        """Set the gains of all Deltas that there are now."""
        if self.options.where == "grad":
            self._governed = [place.delta for place in trained_places(self.model)]
            for delta in self._governed:
                delta.row_gain = self.gain

    @torch.no_grad()
    def on_grads_clipped(self, context: StepContext) -> None:
        """Keep what the step of B starts from."""
        if self.options.where == "update":
            for place in trained_places(self.model):
                factors = place.delta.factors()
                up = place.delta.get_parameter("B")
                if factors is not None and up.requires_grad:
                    gain = self.gain(*factors, place.delta.fold)
                    self._before.append((up, up.detach().clone(), gain))

    @torch.no_grad()
    def on_step_end(self, context: StepContext) -> None:
        """Take the gains away, or blend B with what it was."""
        if not context.skipped:
            for up, before, gain in self._before:
                up.copy_(before + gain[:, None].to(up.dtype) * (up - before))
        self._clear()

    def on_step_failed(self, context: StepContext) -> None:
        """Take the gains away."""
        self._clear()

    def _clear(self) -> None:
        for delta in self._governed:
            del delta.row_gain
        self._governed, self._before = [], []


register_dynamics(ALLoRAConfig)
register_preset("allora", "lora", "LoRA with a learning rate for every row", "allora")
