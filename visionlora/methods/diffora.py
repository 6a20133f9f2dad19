r"""DiffoRA: differential adaptation matrix (Jiang et al. 2025, arXiv 2502.08905).

    Delta W = gamma * s * B A,   s = alpha / r

Derived from the paper's description; it has no public code. Layer l of the model (all sites whose
module names agree up to the last number inside them, such as `blocks.3`) has M sites.

*Search*, for a share `search` of the run: gamma = M softmax(phi)_m with phi = 0 at first, so gamma
starts at 1. The factors learn alone for a share `warmup` (with B = 0 there is no gradient for phi).
Then steps alternate: one of the factors on training data, one of phi on held-out data (betas 0.5
and 0.999, its own rate `search_lr`), which is the first-order form of the bilevel problem.

*Choice*: in each layer the round(`keep` M), at least one, sites of largest phi get gamma = 1 and a
pair of their own. The other sites of one type (the name behind the layer's) and shape share one
pair over all layers (`sharing="share"`), or leave the adapter (`"drop"`). phi is gone, all pairs
start anew, and training goes on as usual.

A: r x in and B: out x r as in LoRA (B = 0, so the change starts at zero). Trained in the search:
r (out + in) scalars a site and one phi for each site that is not alone in its layer; then
r (out + in) for each chosen site, and as much for each type and shape of the others. Merge:
W + Delta W.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, reset_zero_pair
from visionlora.ranks.search import SearchController
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class DiffoRAConfig(LowRankConfig):
    """Options of DiffoRA."""

    method: ClassVar[str] = "diffora"

    keep: float = 0.5
    """Share of the sites of a layer that get a pair of their own."""
    sharing: Literal["share", "drop"] = "share"
    """What becomes of the other sites."""
    search: float = 0.2
    """Share of the run that searches."""
    warmup: float = 0.05
    """Share of the run before phi learns."""
    search_lr: float = 3e-3
    """Learning rate of phi."""
    chosen: str | None = None
    """One `1` or `0` a site, in module order, for chosen or not; None while searching."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ConfigError(f"diffora: keep must lie in (0, 1], got {self.keep}")
        if not 0 <= self.warmup < self.search < 1:
            raise ConfigError(
                f"diffora: 0 <= warmup < search < 1 must hold, got {self.warmup} and {self.search}"
            )
        if not self.search_lr > 0:
            raise ConfigError(f"diffora: search_lr must be positive, got {self.search_lr}")
        if self.chosen is not None and not set(self.chosen) <= {"0", "1"}:
            raise ConfigError(f"diffora: chosen must consist of 0 and 1, got {self.chosen!r}")

    def meaning(self) -> dict[str, Any]:
        """Return rank, scale and choice: the rest matters only in training."""
        options = {"rank": self.rank, "scale": self.scale, "chosen": self.chosen}
        return {"method": self.method, **options}

    def check_plan(self, sites: list[Site]) -> None:
        """Refuse a choice for another number of sites."""
        if self.chosen is not None and len(self.chosen) != len(sites):
            raise ConfigError(
                f"diffora: chosen has {len(self.chosen)} digits, but there are {len(sites)} sites"
            )


def layer_and_type(site: Site) -> tuple[str, str]:
    """Split the name of a site behind the last number that is not its module's own name."""
    *outer, own = site.module.split(".")
    cut = max((i + 1 for i, part in enumerate(outer) if part.isdigit()), default=0)
    return ".".join(outer[:cut]), ".".join([*outer[cut:], own, site.key])


def layers_of(sites: list[Site]) -> list[list[int]]:
    """Return the indices of the sites of every layer."""
    found: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        found.setdefault(layer_and_type(site)[0], []).append(index)
    return list(found.values())


def _group(site: Site) -> tuple[str, int, int]:
    return layer_and_type(site)[1], site.out_features, site.in_features


class DifferentialMatrix(Shared):
    """The logits phi while searching; then the pairs that sites share."""

    depends_on_all_sites = True

    def __init__(self, config: DiffoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.chosen = config.chosen
        self.index = {site.name: i for i, site in enumerate(sites)}
        self.layers = [layer for layer in layers_of(sites) if len(layer) > 1]
        self.logits = nn.ParameterList()
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.pairs: dict[tuple[str, int, int], int] = {}
        if config.chosen is None:
            self.logits.extend(nn.Parameter(torch.zeros(len(layer))) for layer in self.layers)
            return
        for site, digit in zip(sites, config.chosen, strict=True):
            if digit == "0" and _group(site) not in self.pairs:
                self.pairs[_group(site)] = len(self.pairs)
                A, B = (torch.empty(config.rank, site.in_features),
                        torch.empty(site.out_features, config.rank))  # fmt: skip
                generator = named_generator(config.seed, f"diffora {_group(site)}")
                reset_zero_pair(A, B, site.kind, generator)
                self.A.append(A)
                self.B.append(B)

    def owns(self, site: Site) -> bool:
        """Return whether a site has a pair of its own."""
        return self.chosen is None or self.chosen[self.index[site.name]] == "1"

    def gate(self, site: Site) -> Tensor | None:
        """Return gamma of a site while searching, None where it is always 1."""
        if self.chosen is None:
            own = self.index[site.name]
            for layer, logits in zip(self.layers, self.logits, strict=True):
                if own in layer:
                    return len(layer) * logits.softmax(0)[layer.index(own)]
        return None

    def pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the shared `(B, A)` of a site that has none of its own."""
        index = self.pairs[_group(site)]
        return self.B[index], self.A[index]

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return the number of logits; then the shared pairs, less what their sites do without."""
        if config.chosen is None:
            return sum(len(layer) for layer in layers_of(sites) if len(layer) > 1)
        others = [s for s, digit in zip(sites, config.chosen, strict=True) if digit == "0"]
        sizes = {_group(site): site.out_features + site.in_features for site in others}
        spared = sum(site.out_features + site.in_features for site in others)
        return int(config.rank * (sum(sizes.values()) - spared))


class DiffoRA(Delta):
    """A factor pair that is gated, its own, or shared."""

    def __init__(self, config: DiffoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.site = site
        if self._matrix.owns(site):
            self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
            self.B = nn.Parameter(torch.empty(site.out_features, config.rank))

    @property
    def _matrix(self) -> DifferentialMatrix:
        matrix = self._shared[0]
        assert isinstance(matrix, DifferentialMatrix)
        return matrix

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the factors as LoRA does, where the site has any."""
        if self._matrix.owns(self.site):
            reset_zero_pair(self.A, self.B, self.site.kind, generator)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(gamma B, A)`."""
        if not self._matrix.owns(self.site):
            return self._matrix.pair(self.site)
        gate = self._matrix.gate(self.site)
        return self.B if gate is None else gate * self.B, self.A

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in); what others spare is in the count of the shared part."""
        return int(config.rank * (out_features + in_features))


register(DiffoRAConfig, DiffoRA, DifferentialMatrix, SearchController)
