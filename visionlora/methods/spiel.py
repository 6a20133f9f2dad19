r"""SpIEL: sparse fine-tuning that follows the gradient (Ansell et al. 2024, arXiv 2401.16405).

    Delta W = scatter(v, I),   Delta W[I_j] = v_j,   j = 1 .. k;   dL/dv = (dL/dW)[I]

I: k flat positions of the out x in weight, each at most once; v: k values. k is `density` times
out in, or `count`. Of 768 x 768, density 2 r / 768 trains as many scalars as LoRA of rank r.

Initial values: I drawn at random, sorted; v = 0. While training (see `visionlora.ranks.spiel`),
every `every` steps the entries with the smallest |v|, a share p of them, are dropped for others.
v starts at zero, so |v| is what an entry has changed since it was grown. Of T steps, after t:

    linear:  p = 1 at the first selection, then p = rate (1 - t / T)
    cosine:  p = rate (1 + cos(pi t / T)) / 2

`selection="gradient"`: for the `observe` steps before a selection the gradient of W is looked at:
the k largest entries in the first of them are the candidates, of which those with the largest mean
gradient are grown. Adam keeps an age per entry for its bias correction, and grown entries start
with the moments that these gradients make. The squares are those of the averaged gradient of a
step, and windows have exactly `observe` steps (both derived), so that accumulation and processes
change no number. `selection="sm3"`: SM3 has an accumulator for each row and column instead of
moments, and the inactive entries with the largest product of the two are grown: no gradient of W
is looked at, and the optimiser's state is out + in numbers. `selection="fixed"`: I stays, and the
optimiser of the run trains v.

Except with `fixed`, v is trained by these rules with learning rate, betas, eps and weight decay of
its optimiser group, whatever the optimiser. Weight decay pulls v to zero, so W to the pretrained
weight. A dense matrix is formed per layer and step, and its gradient in the backward, one layer
after the other; neither is kept.

Trained: k scalars a site, saved with k int32 positions: 8 bytes each. Merge: W + Delta W.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, Form
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared
from visionlora.ranks.spiel import SpIELController
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class SpIELConfig(AdapterConfig):
    """Options of SpIEL."""

    method: ClassVar[str] = "spiel"
    form: ClassVar[Form] = "sparse"

    density: float = 0.02
    """Trained share of the entries of every weight."""
    count: int | None = None
    """Number of trained entries of every weight, in place of `density`."""
    selection: Literal["gradient", "sm3", "fixed"] = "gradient"
    """By what entries are grown, and which optimiser trains them."""
    every: int = 20
    """Steps between two selections."""
    observe: int = 5
    """Steps before the first selection; gradients are looked at in as many before each."""
    rate: float = 0.2
    """Largest share of entries that is replaced after the first selection."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the share falls; `linear` replaces all of the random start at the first selection."""
    candidates: Literal["step", "batch"] = "step"
    """Whether all micro-batches of a step decide what may be grown, or its first one, as in the
    published code. `step` holds the gradients of all adapted weights between micro-batches, once
    per selection, where gradients are accumulated."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ConfigError(f"spiel: density must lie in (0, 1], got {self.density}")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"spiel: count must be at least 1 or None, got {self.count}")
        if not 1 <= self.observe <= self.every:
            raise ConfigError(
                f"spiel: observe must lie between 1 and every ({self.every}), got {self.observe}"
            )
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"spiel: rate must lie in [0, 1], got {self.rate}")

    def entries(self, out_features: int, in_features: int) -> int:
        """Return k for a weight of this size."""
        if self.count is not None:
            return self.count
        return max(1, round(self.density * out_features * in_features))

    def check_site(self, site: Site) -> None:
        """Refuse more entries than the weight has."""
        size = site.out_features * site.in_features
        if self.entries(site.out_features, site.in_features) > size:
            raise ConfigError(
                f"spiel: {self.count} entries are more than {site.name or 'the layer'} has: its "
                f"view is {site.out_features} x {site.in_features}, so at most {size}"
            )

    def meaning(self) -> dict[str, Any]:
        """Return how many entries there are: the rest matters only in training."""
        return {"method": self.method, "density": self.density, "count": self.count}


class SpIEL(Delta):
    """Values at some entries of the weight."""

    index: Tensor
    observer: Callable[[Tensor], None] | None = None
    """Is shown the gradient of the change in the backward, while it is set."""

    def __init__(self, config: SpIELConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.shape = site.out_features, site.in_features
        count = config.entries(*self.shape)
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("index", torch.empty(count, dtype=torch.int32))
        self.carried = True  # training moves the entries, so they cannot be drawn again

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the positions, and set all values to zero."""
        size = self.shape[0] * self.shape[1]
        drawn = torch.randperm(size, generator=generator, device="cpu")[: len(self.index)]
        self.index.copy_(drawn.sort().values)
        self.values.zero_()

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the values at their positions in a matrix of zeros."""
        size = self.shape[0] * self.shape[1]
        change = self.values.new_zeros(size).index_add(0, self.index, self.values).view(self.shape)
        # Not in a forward without a graph: the one that builds the change again has the gradient.
        if self.observer is not None and change.requires_grad:
            change.register_hook(self.observer)
        return change

    def frozen(self) -> dict[str, Tensor]:
        """The positions."""
        return {"index": self.index}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return k."""
        return int(config.entries(out_features, in_features))


register(SpIELConfig, SpIEL, controller=SpIELController)
