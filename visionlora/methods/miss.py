r"""MiSS: matrix shard sharing (Kang and Yin 2024, arXiv 2409.15371).

    Delta W[i, j] = D[j mod r, i],   D: r x out   (variant "balance")
    y = W x + b + D^T (x_1 + ... + x_n),   x_k: the shards of r entries of x, the last zero-padded

All n = ceil(in / r) shards of the input share one matrix, so there is no second factor; the rank is
at most r. Two other variants:

    "mini":  Delta W[i, j] = D[j mod r, i mod m],   D: r x m,   m = mini_rank dividing out
    "bat":   Delta W_kl = W_kl D_k + D_k,   D: out/r x r x r,   W_kl the r x r blocks of W,
             r dividing out and in; not additive, because the change depends on W

Initial values: D = 0. There is no scale. Trained: r out scalars a site ("mini": r m). Merge: W +
Delta W with the frozen W. The columns j are those of the view on a convolution and the tokens on an
Embedding (both derived: the reference has linear layers only).

Cost of the additive variants: n additions and one product of width r a token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Layer, Shared
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(AdapterConfig):
    """Options of MiSS."""

    method: ClassVar[str] = "miss"

    rank: int = 64
    """Length r of a shard of the input."""
    variant: Literal["balance", "bat", "mini"] = "balance"
    """Which change is trained; see the module."""
    mini_rank: int = 1
    """Number m of distinct outputs of variant `mini`."""
    dropout: float = 0.0
    """Dropout of the branch input while training; not for `bat`, which has no branch."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("rank", "mini_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"miss: {name} must be at least 1, got {getattr(self, name)}")
        if self.variant == "bat" and self.dropout:
            raise ConfigError(f"miss: variant 'bat' has no dropout, got {self.dropout}")

    def check_site(self, site: Site) -> None:
        """Refuse shards that the site cannot have."""
        layer, shape = site.name or "the layer", f"{site.out_features} x {site.in_features}"
        if self.rank > site.in_features:
            raise ConfigError(
                f"miss: rank {self.rank} is larger than the input of {layer}: its view is {shape}, "
                f"so at most {site.in_features}"
            )
        if self.variant == "bat" and (
            site.in_features % self.rank or site.out_features % self.rank
        ):
            raise ConfigError(
                f"miss: rank must divide both dimensions in variant 'bat', got rank {self.rank} "
                f"and {shape} at {layer}"
            )
        if self.variant == "mini" and site.out_features % self.mini_rank:
            raise ConfigError(
                f"miss: mini_rank must divide the output in variant 'mini', got {self.mini_rank} "
                f"and {shape} at {layer}"
            )


class MiSS(Delta):
    """One matrix that all shards of the input share."""

    seeded: ClassVar[bool] = False

    def __init__(self, config: MiSSConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        self.out_features, self.in_features = site.out_features, site.in_features
        self.D = nn.Parameter(torch.empty(_shape(config, site.out_features)))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set D to zero."""
        self.D.zero_()

    def up(self) -> Float[Tensor, "out rank"]:
        """Return D^T with all its outputs."""
        return self.D.t().repeat(self.out_features // self.D.shape[1], 1)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return D^T and the sum over shards, as a matrix; None for `bat`."""
        if self.options.variant == "bat":
            return None
        rank = self.options.rank
        sums = torch.eye(rank, dtype=self.D.dtype, device=self.D.device)
        return self.up(), sums.repeat(1, -(-self.in_features // rank))[:, : self.in_features]

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the change; see the module docstring."""
        if self.options.variant != "bat":
            return super().delta(weight)
        rank = self.options.rank
        blocks = weight.to(torch.promote_types(weight.dtype, self.D.dtype))
        blocks = blocks.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).permute(2, 0, 1, 3)
        change = blocks @ self.D + self.D
        return change.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    @property
    def update(self) -> Any:
        """The path that adds up shards; a convolution takes the factors, `bat` the change."""
        if self.options.variant == "bat":
            return None
        return {"linear": self._add_shards, "embedding": self._look_up}.get(self.kind)

    def _add_shards(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return `y + D^T (x_1 + ... + x_n)`."""
        rank = self.options.rank
        x = F.pad(layer.dropout(x, self.dropout), (0, -self.in_features % rank))
        shards = x.unflatten(-1, (-1, rank)).sum(-2)
        return y + F.linear(shards.to(x.dtype), self.up().to(y.dtype))

    def _look_up(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Add the columns `x` of the change."""
        return y + F.embedding(x % self.options.rank, self.up().t()).to(y.dtype)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r out, or r m for `mini`."""
        return int(torch.Size(_shape(config, out_features)).numel())


def _shape(config: MiSSConfig, out_features: int) -> tuple[int, ...]:
    if config.variant == "bat":
        return out_features // config.rank, config.rank, config.rank
    return config.rank, config.mini_rank if config.variant == "mini" else out_features


register(MiSSConfig, MiSS)
