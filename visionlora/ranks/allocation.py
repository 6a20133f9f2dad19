"""How a wanted size becomes ranks: one rank, a share of energy per site, or one budget for all."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.ranks.factors import Triples, leading_triples, singular_triples
from visionlora.sites import named_generator

Keep = Literal["scaling", "alpha"]

_EXACT_UP_TO = 256
"""Larger ranks are approximated from random probes where only a few triples are wanted."""


@dataclass(frozen=True)
class Spectrum:
    """Singular triples of one site's pair."""

    site: str
    before: int
    """Rank of the pair."""
    triples: Triples
    size: float
    """Factor between the singular values of the pair and those of the change."""


@dataclass(frozen=True)
class Request:
    """What is wanted: exactly one of the three.

    Raises:
        ConfigError: none or several of them, or a value out of range.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        given = [key for key, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ConfigError(
                f"give one of rank, energy and budget, got {' and '.join(given) or 'none'}"
            )
        for key in ("rank", "budget"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{key} must be a whole number of at least 1, got {value!r}")
        energy = 1.0 if self.energy is None else self.energy
        if not isinstance(energy, int | float) or not 0.0 < energy <= 1.0:
            raise ConfigError(f"energy must lie in (0, 1], got {energy!r}")

    def spectrum(self, site: str, up: Tensor, down: Tensor, size: float) -> Spectrum:
        """Return the triples of a pair, as many as the request needs."""
        rank = up.shape[-1]
        if self.rank is not None and up.dim() == 2 and rank > max(_EXACT_UP_TO, 2 * self.rank):
            generator = named_generator(0, f"squeeze {site}")
            return Spectrum(site, rank, leading_triples(up, down, self.rank, generator), size)
        return Spectrum(site, rank, singular_triples(up, down), size)

    def ranks(self, spectra: Sequence[Spectrum]) -> list[int]:
        """Return the rank of every site; 0 where nothing is worth keeping."""
        if self.rank is not None:
            return [min(self.rank, len(item.triples.spectrum)) for item in spectra]
        if self.energy is not None:
            return [rank_for_energy(item.triples.spectrum, self.energy) for item in spectra]
        assert self.budget is not None
        return ranks_for_budget(
            [item.size * item.triples.spectrum for item in spectra], self.budget
        )


@dataclass(frozen=True)
class SqueezedSite:
    """What became of one site."""

    site: str
    before: int
    """Rank of the factor pair before."""
    after: int
    """Rank now; 0 where the site was taken out."""
    error: float
    """Frobenius norm of what was lost, relative to the product of the pair."""


@dataclass(frozen=True)
class SqueezeReport:
    """Ranks and errors of all sites; `str()` gives a table."""

    sites: tuple[SqueezedSite, ...]
    error: float
    """Frobenius norm of what was lost over all sites, scale included, relative to the whole."""

    def __str__(self) -> str:
        before, after = sum(s.before for s in self.sites), sum(s.after for s in self.sites)
        rows = [*self.sites, SqueezedSite("all sites", before, after, self.error)]
        return "\n".join(
            f"{row.site:40} {row.before:5} -> {row.after:4}   error {100 * row.error:7.3f} %"
            for row in rows
        )


def report(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> SqueezeReport:
    """Return what cutting the spectra to the ranks loses."""
    sites = []
    lost = whole = 0.0
    for item, rank in zip(spectra, ranks, strict=True):
        error, norm = item.triples.error(rank), item.triples.energy**0.5
        share = error / norm if norm > 0.0 else 0.0
        sites.append(SqueezedSite(item.site, item.before, rank, share))
        lost, whole = lost + (item.size * error) ** 2, whole + (item.size * norm) ** 2
    return SqueezeReport(tuple(sites), (lost / whole) ** 0.5 if whole > 0.0 else 0.0)


def rank_for_energy(values: Float[Tensor, " k"], share: float) -> int:
    """Return the smallest rank that keeps `share` of the squared singular values.

    A product that is zero needs rank 0.
    """
    squares = values.double().square().cumsum(0)
    if len(squares) == 0 or float(squares[-1]) == 0.0:
        return 0
    # The last sum is the whole, so rounding must not ask for one more than there is.
    return int((squares < share * squares[-1] * (1 - 1e-12)).sum()) + 1


def ranks_for_budget(spectra: Sequence[Float[Tensor, " k"]], budget: int) -> list[int]:
    """Share `budget` ranks over several products so that the squares kept are the largest.

    Directions of value zero are not handed out, so the sum may stay below the budget.
    """
    ranked = sorted(
        (-float(value), site)
        for site, values in enumerate(spectra)
        for value in values
        if float(value) > 0.0
    )
    ranks = [0] * len(spectra)
    for _, site in ranked[:budget]:
        ranks[site] += 1
    return ranks


def resized(config: LowRankConfig, rank: int, keep: Keep = "scaling") -> LowRankConfig:
    """Return the configuration of another rank, with the same scaling factor or the same alpha."""
    if keep == "alpha":
        alpha = config.rank if config.alpha is None else config.alpha
        return dataclasses.replace(config, rank=rank, alpha=float(alpha))
    same = dataclasses.replace(config, rank=rank)
    if same.scale == config.scale:
        return same
    size = rank if config.scaling == "standard" else rank**0.5
    return dataclasses.replace(config, rank=rank, alpha=config.scale * size)
