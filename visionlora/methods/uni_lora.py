r"""Uni-LoRA: all factors of a model from one vector (Li et al. 2025, arXiv 2506.00799).

    theta_D = P theta_d,   Delta W = B A   with A: r x in, B: out x r cut from theta_D

theta_D, of length D = sum of r (in + out), is A then B of every site in order, row by row. Row i of
P has one entry, `1 / sqrt(n_j)` at column `j = index[i]`, where n_j is how often j is used, so that
`P^T P = I`. The index is balanced, every n_j being floor(D / d) or ceil(D / d), and drawn from the
seed. One gather per step, whatever the number of tokens; its gradient is a scatter-add, whose order
on a GPU is fixed by `torch.use_deterministic_algorithms`.

Initial values: theta_d uniform in +-0.02, so the change is small but not zero (zero would be a dead
saddle). `anchor=True` subtracts the initial change, as `(B - B_0) A + B_0 (A - A_0)`, and the
function is exactly preserved, at twice the rank.

Trained: d scalars in all, not per site. `length=None` takes half of D (derived: the ratio of the
paper's ViT runs, 72,000 of 147,456; they train at 5e-3 to 1e-2). d must not exceed D. Files hold
theta_d; index, lengths and initial vector follow from seed and sites. They depend on every site, so
the names and shapes of the sites are fingerprinted too: with one target more, less or moved, a file
is refused. Merge: W + Delta W.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(AdapterConfig):
    """Options of Uni-LoRA."""

    method: ClassVar[str] = "uni-lora"

    rank: int = 4
    """Inner dimension r of the factor pairs."""
    length: int | None = None
    """Length d of the trained vector; None means half of all factor entries."""
    bound: float = 0.02
    """The vector starts uniform in +-bound."""
    anchor: bool = False
    """Subtract the initial change, so that the function is preserved."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.length is not None and self.length < 1:
            raise ConfigError(f"uni-lora: length must be at least 1, got {self.length}")
        if not self.bound > 0:
            raise ConfigError(f"uni-lora: bound must be positive, got {self.bound}")

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the site cannot have."""
        if self.rank > site.max_rank:
            raise ConfigError(
                f"uni-lora: rank {self.rank} is larger than {site.name or 'the layer'} allows: "
                f"its view is {site.out_features} x {site.in_features}, so at most {site.max_rank}"
            )

    def check_plan(self, sites: list[Site]) -> None:
        """Refuse a vector that is longer than what it is spread over."""
        entries = factor_entries(self, sites)
        if self.length is not None and self.length > entries:
            raise ConfigError(
                f"uni-lora: length {self.length} is more than the {entries} factor entries of the "
                f"layer{'s' * (len(sites) > 1)} at rank {self.rank}"
            )

    def vector_length(self, sites: list[Site]) -> int:
        """Return d."""
        return self.length or max(1, factor_entries(self, sites) // 2)


class UniLoRAVector(Shared):
    """The trained vector, and where its entries go."""

    depends_on_all_sites = True
    index: Tensor
    inverse_root: Tensor
    initial: Tensor
    sites: Tensor

    def __init__(self, config: UniLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.starts: dict[str, int] = {}
        start = 0
        for site in sites:
            self.starts[site.name] = start
            start += factor_entries(config, [site])
        length = config.vector_length(sites)
        index = balanced_index(start, length, named_generator(config.seed, "uni-lora.index"))
        count = torch.bincount(index, minlength=length)
        generator = named_generator(config.seed, "uni-lora.vector")
        initial = uniform((length,), config.bound, generator)
        self.theta = nn.Parameter(initial.clone())
        self.register_buffer("index", index.int(), persistent=False)
        self.register_buffer("inverse_root", count.float().rsqrt(), persistent=False)
        self.register_buffer("initial", initial if config.anchor else None, persistent=False)
        self.register_buffer("sites", _digest(sites), persistent=False)

    def factors(
        self, theta: Float[Tensor, " length"], site: Site, rank: int
    ) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """Return A and B of a site, gathered from a vector."""
        start, first = self.starts[site.name], rank * site.in_features
        index = self.index[start : start + first + rank * site.out_features]
        values = (theta * self.inverse_root).index_select(0, index)
        return values[:first].view(rank, -1), values[first:].view(-1, rank)

    def frozen(self) -> dict[str, Tensor]:
        """Names and shapes of the sites, the index, the lengths, and the anchor."""
        found = {"sites": self.sites, "index": self.index, "inverse_root": self.inverse_root}
        return found if self.initial is None else {**found, "initial": self.initial}

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return d."""
        return int(config.vector_length(sites))


class UniLoRA(Delta):
    """A site's share of the vector; it has no trainables of its own."""

    def __init__(self, config: UniLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.site = site

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the initial change is subtracted."""
        return self.options.anchor

    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Nothing to set: the vector is drawn once for all sites."""

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`, or `([B - B_0, B_0], [A; A - A_0])` with an anchor."""
        vector = self._shared[0]
        assert isinstance(vector, UniLoRAVector)
        A, B = vector.factors(vector.theta, self.site, self.options.rank)
        if not self.options.anchor:
            return B, A
        A0, B0 = vector.factors(vector.initial, self.site, self.options.rank)
        return torch.cat([B - B0, B0], 1), torch.cat([A, A - A0])

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 0."""
        return 0


def factor_entries(config: UniLoRAConfig, sites: list[Site]) -> int:
    """Return D, the number of factor entries of all sites."""
    return sum(config.rank * (site.in_features + site.out_features) for site in sites)


def balanced_index(
    entries: int, length: int, generator: torch.Generator
) -> Int[Tensor, " entries"]:
    """Return a shuffled index in which every value occurs equally often, give or take one."""
    rest = torch.randperm(length, generator=generator)[: entries % length]
    values = torch.cat([torch.arange(length).repeat(entries // length), rest])
    return values[torch.randperm(entries, generator=generator)]


def _digest(sites: list[Site]) -> Float[Tensor, " 8"]:
    """Return eight numbers that name the sites, their shapes and their order."""
    text = "\n".join(f"{site.name} {site.out_features} {site.in_features}" for site in sites)
    digest = hashlib.sha256(text.encode()).digest()
    return torch.tensor([float(byte) for byte in digest[:8]])  # exact in every type


register(UniLoRAConfig, UniLoRA, UniLoRAVector)
