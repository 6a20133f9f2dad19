r"""Bit operations of an adapter: multiply-adds times the widths of both operands.

    T * r_eff * (in * b_A * b_x + out * b_B * b_h)

T: positions the site is applied to. `in` counts every group of a convolution; looking up rows of
an embedding multiplies nothing. Activations (b_x, b_h) have 32 bits unless said otherwise. The
baseline is the same pair with 32 bits everywhere at full rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from visionlora.errors import AdapterStateError
from visionlora.ranks.squeeze import choose, settled_factors
from visionlora.ranks.structure import Place, places_of

FULL = 32


@runtime_checkable
class Quantised(Protocol):
    """A Delta with decided ranks and bit widths."""

    @property
    def effective_rank(self) -> int:
        """Ranks that are left."""

    def bits(self, name: str) -> int:
        """Bit width of factor `A` or `B`."""


@dataclass(frozen=True)
class SiteBops:
    """Figures of one site."""

    site: str
    rank: int
    full_rank: int
    bits_down: int
    bits_up: int
    bops: int
    baseline: int


@dataclass(frozen=True)
class BopsReport:
    """Figures of all sites; `str()` gives a table."""

    sites: tuple[SiteBops, ...]

    @property
    def bops(self) -> int:
        """Bit operations of all sites."""
        return sum(item.bops for item in self.sites)

    @property
    def baseline(self) -> int:
        """Bit operations at 32 bits and full rank."""
        return sum(item.baseline for item in self.sites)

    @property
    def share(self) -> float:
        """Part of the baseline that is left."""
        return self.bops / self.baseline

    def __str__(self) -> str:
        rows = [
            f"{item.site:40} rank {item.rank:3} of {item.full_rank:3}   A {item.bits_down:2} bit   "
            f"B {item.bits_up:2} bit   {100 * item.bops / item.baseline:6.2f} %"
            for item in self.sites
        ]
        whole = f"all sites: {self.bops:,} of {self.baseline:,} bit operations"
        return "\n".join([*rows, f"{whole} ({100 * self.share:.2f} %)"])


def bops(
    model: nn.Module,
    name: str | None = None,
    *,
    tokens: int | Mapping[str, int] = 1,
    full_rank: int | None = None,
    activation_bits: int = FULL,
) -> BopsReport:
    """Count the bit operations of an adapter's factor pairs.

    Args:
        model: a model with the adapter.
        name: which adapter; may be omitted if there is one.
        tokens: positions that every site is applied to, or `{site: positions}`.
        full_rank: rank of the baseline; the rank that the pairs have now, if omitted.
        activation_bits: width of the inputs of both factors.

    Raises:
        AdapterStateError: no such adapter, or a method without a factor form.
    """
    found = []
    for place in places_of(model, choose(model, name)):
        count = tokens if isinstance(tokens, int) else tokens[place.name]
        found.append(_site_bops(place, count, full_rank, activation_bits))
    return BopsReport(tuple(found))


def _site_bops(place: Place, tokens: int, full: int | None, activation: int) -> SiteBops:
    delta, site = place.delta, place.site
    pair = settled_factors(delta)
    if pair is None:
        raise AdapterStateError(
            f"bops: {delta.config.method} at {place.name or 'the layer'} has no factor form"
        )
    rank = widest = pair[1].shape[0]
    bits_down = bits_up = FULL
    if isinstance(delta, Quantised):
        rank, bits_down, bits_up = delta.effective_rank, delta.bits("A"), delta.bits("B")
    down = 0 if site.kind == "embedding" else site.in_features * site.groups // delta.fold
    up = site.out_features
    widest = widest if full is None else full
    return SiteBops(
        site=place.name,
        rank=rank,
        full_rank=widest,
        bits_down=bits_down,
        bits_up=bits_up,
        bops=tokens * rank * activation * (down * bits_down + up * bits_up),
        baseline=tokens * widest * FULL * FULL * (down + up),
    )
