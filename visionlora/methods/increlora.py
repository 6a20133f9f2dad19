r"""IncreLoRA: incremental parameter allocation (Zhang et al. 2023, arXiv 2308.12043).

    Delta W = s * (P_0 diag(E_0) Q_0 + P_1 diag(E_1) Q_1 + ...) + s * e * P' Q'

Every site begins with a block of `rank` triples (P: out x r, Q: r x in from N(0, 0.02^2), E = 0)
and a reserve block (P', Q') of `add` triples. With advance learning the reserve is trained while
its singular values stay at e = 1e-5, so that it is ready when it is needed; without, it is frozen
and e = 0. P and Q, reserve included, are kept near orthonormal by a term in the loss.

Importance of a site, smoothed like AdaLoRA's and times its smoothed uncertainty:

    I = sum |Delta W * dL/dDelta W| / sqrt(out in)

The gradient of Delta W is never stored: in the `watch` steps before a growth each site keeps input
and output gradient, and I is summed over chunks of rows. After `warmup` T steps, every `interval`
steps (derived: spread up to `end` T) the `top` best sites gain `add` ranks: the reserve gets
trained singular values and a new one is appended; the new tensors form an optimiser group with a
warm-up of its own, one interval long. Growth ends when the sites have `target` ranks on average;
the last round adds only what is missing, and the reserve goes.

Scale: `fixed` s = alpha / target, so growing changes no other rank (derived); `legacy`
s = alpha / (current rank + 1e-5), as the published code does.

Trained at first: r (out + in + 1) scalars a site, and add (out + in) for a trained reserve. Merge:
W + Delta W. At the end of training E goes into Q, and the site is plain LoRA of its rank.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Layer, Shared
from visionlora.ranks.growth import GrowthController
from visionlora.ranks.watch import Watched, watched_gradient
from visionlora.registry import register
from visionlora.sites import Site

ADVANCE = 1e-5
"""Singular values of a trained reserve."""


@dataclass(frozen=True, kw_only=True)
class IncreLoRAConfig(AdapterConfig):
    """Options of IncreLoRA."""

    method: ClassVar[str] = "increlora"

    rank: int = 1
    """Rank of every site at the beginning."""
    gained: int = 0
    """Ranks that this site has gained so far; set by training."""
    target: float = 4.0
    """Mean rank of the sites at the end."""
    add: int = 2
    """Ranks that a site gains at once; the paper has 1, 2, 3, 4 for targets 2, 4, 6, 8."""
    reserve: bool = True
    """Whether there is a reserve; training takes it away at the target."""
    advance: bool = True
    """Train the reserve before it is needed."""
    alpha: float = 16.0
    """Numerator of the scale."""
    scale_by: Literal["fixed", "legacy"] = "fixed"
    """`fixed`: s = alpha / target. `legacy`: s = alpha / (current rank + 1e-5)."""
    dropout: float = 0.0
    """Probability of dropping an input entry of the adapter branch while training."""
    orthogonality: float = 0.1
    """Weight of the orthogonality term."""
    beta: float = 0.85
    """Smoothing of importance and uncertainty."""
    top: int = 5
    """Sites that grow at once."""
    warmup: float = 0.1
    """Share of the run before the first growth."""
    end: float = 0.6
    """Share of the run after which no site grows, if `interval` does not say otherwise."""
    interval: int | None = None
    """Steps between two growths; None spreads the growths needed evenly from `warmup` to `end`."""
    watch: int = 10
    """Steps before a growth in which importance is measured."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("rank", "add", "top", "interval", "watch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"increlora: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.gained < 0:
            raise ConfigError(f"increlora: gained must not be negative, got {self.gained}")
        if self.target <= 0:
            raise ConfigError(f"increlora: target must be positive, got {self.target}")
        if self.orthogonality < 0:
            raise ConfigError(
                f"increlora: orthogonality must not be negative, got {self.orthogonality}"
            )
        if not self.warmup < self.end <= 1:
            raise ConfigError(
                f"increlora: end must lie in ({self.warmup}, 1], after warmup, got {self.end}"
            )
        for name in ("dropout", "beta", "warmup"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"increlora: {name} must lie in [0, 1), got {getattr(self, name)}"
                )

    @property
    def total(self) -> int:
        """Current rank of the site, without the reserve."""
        return self.rank + self.gained

    @property
    def blocks(self) -> list[int]:
        """Sizes of the blocks, without the reserve."""
        full, rest = divmod(self.gained, self.add)
        return [self.rank, *[self.add] * full, *([rest] if rest else [])]

    @property
    def scale(self) -> float:
        """The constant s."""
        return self.alpha / (self.target if self.scale_by == "fixed" else self.total + 1e-5)

    def meaning(self) -> dict[str, Any]:
        """Return ranks, reserve and scale: the rest matters only in training."""
        names = ("rank", "gained", "add", "reserve", "advance")
        options = {name: getattr(self, name) for name in names}
        return {"method": self.method, **options, "scale": self.scale}

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the site cannot have."""
        check_rank(self.method, self.total, site)


class IncreLoRA(Delta):
    """Blocks of singular triples, of which the last may be the reserve."""

    def __init__(self, config: IncreLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.out_features, self.in_features = site.out_features, site.in_features
        self.watching: Watched | None = None
        sizes = [*config.blocks, *([config.add] if config.reserve else [])]
        self.P = nn.ParameterList(torch.empty(site.out_features, size) for size in sizes)
        self.Q = nn.ParameterList(torch.empty(size, site.in_features) for size in sizes)
        self.E = nn.ParameterList(torch.empty(size) for size in config.blocks)
        if config.reserve and not config.advance:
            self.P[-1].requires_grad_(False)
            self.Q[-1].requires_grad_(False)

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero: a trained reserve adds a little."""
        return not (self.options.reserve and self.options.advance)

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw P and Q, block after block, and set E to zero."""
        for P, Q in zip(self.P, self.Q, strict=True):
            for part in (P, Q):
                part.copy_(torch.empty(part.shape).normal_(0.0, 0.02, generator=generator))
        for E in self.E:
            E.zero_()

    def values(self) -> Float[Tensor, " rank"]:
        """Return all singular values, the fixed ones of the reserve included."""
        parts = list(self.E)
        if self.options.reserve:
            parts.append(self.E[0].new_full((self.options.add,), ADVANCE * self.options.advance))
        return torch.cat(parts)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return `(P, diag(E) Q)` over all blocks; nothing while watched, when others must run."""
        return self.pair() if self.watching is None else None

    def pair(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(P, diag(E) Q)` over all blocks."""
        return torch.cat(list(self.P), 1), self.values()[:, None] * torch.cat(list(self.Q))

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the change, watched if it is time."""
        up, down = self.pair()
        change = self.scale * (up @ down)
        if self.watching is not None and change.requires_grad:
            change.register_hook(self.watching.add_dense)
        return change

    @property
    def update(self) -> Any:
        """While watched, the output is formed here, so that its gradient can be seen."""
        return None if self.watching is None else self._watched_update

    def _watched_update(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        assert self.watching is not None
        up, down = (part.to(y.dtype) for part in self.pair())
        x = layer.dropout(x, self.dropout)
        part = self.scale * layer.up(layer.down(x, down), up)
        if part.requires_grad:
            part.register_hook(watched_gradient(self.watching, x.detach(), layer))
        return y + part

    def kept(self) -> Bool[Tensor, " rank"]:
        """Return which triples are not in reserve."""
        values = self.values().detach()
        return torch.arange(len(values), device=values.device) < self.options.total

    def grown(self, gain: int, *, last: bool) -> IncreLoRAConfig:
        """Return the configuration after a growth, or at the target."""
        config = dataclasses.replace(self.options, gained=self.options.gained + gain)
        return dataclasses.replace(config, reserve=False) if last else config

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return R (out + in + 1) for the current rank R, and add (out + in) for the reserve."""
        reserve = config.add if config.reserve and config.advance else 0
        return int(config.total * (out_features + in_features + 1)) + int(
            reserve * (out_features + in_features)
        )


register(IncreLoRAConfig, IncreLoRA, controller=GrowthController)
