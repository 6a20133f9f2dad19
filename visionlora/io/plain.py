"""Any change as a plain LoRA pair: exactly where that is possible, else the best of a given rank.

A factor pair is kept as it is if its rank fits; other changes go through a singular value
decomposition, whose first k triples are the best rank-k approximation (Eckart and Young 1936).
Changes of biases and norms are no matrices: they become trained tensors of the base model.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.parts import AdapterParts, Entry
from visionlora.methods.parts.noise import without_noise
from visionlora.ranks.factors import Triples, singular_triples
from visionlora.sites import Site


@dataclass(frozen=True)
class Pair:
    """The change of one site as `scale * up @ down`."""

    site: Site
    up: Tensor
    down: Tensor
    scale: float
    missing: float
    """Frobenius norm of what the pair leaves out."""
    size: float
    """Frobenius norm of the whole change."""

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return self.missing / self.size if self.size else 0.0


@torch.no_grad()
def pair_of(parts: AdapterParts, entry: Entry, rank: int | None) -> Pair:
    """Return the change of a site as a pair of at most `rank`; None means exactly.

    Raises:
        AdapterFileError: the change depends on a base weight that is not known.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    limit = min(entry.site.max_rank, rank or entry.site.max_rank)
    with without_noise(entry.delta) as delta:
        factors = delta.factors()
    if factors is None:
        dense = parts.change(entry)
        dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
        triples, scale = Triples(*torch.linalg.svd(dense, full_matrices=False)), 1.0
    else:
        up, down = factors[0], factors[1].repeat(1, entry.delta.fold)
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            parts.change(entry)  # says that it is for want of a base weight
            raise AdapterFileError(f"{entry.site.name}: the change holds NaN or infinity")
        if entry.padding is not None:
            down = down.index_fill(1, torch.tensor([entry.padding], device=down.device), 0.0)
        scale = entry.strength * entry.delta.scale
        if down.shape[0] == 0:  # a method that leaves the weight alone
            up, down = up.new_zeros(len(up), 1), down.new_ones(1, down.shape[1])
        if down.shape[0] <= limit:
            size = abs(scale) * float((up.double() @ down.double()).norm())
            return Pair(entry.site, up.detach(), down.detach(), scale, 0.0, size)
        triples = singular_triples(up, down)
    values = triples.values
    noise = values[:1].sum() * max(entry.site.out_features, entry.site.in_features)
    kept = min(limit, max(1, int((values > noise * torch.finfo(values.dtype).eps).sum())))
    size = abs(scale) * triples.energy**0.5
    # What is left below the rounding of the values is no error.
    missing = abs(scale) * triples.error(kept) if kept == limit else 0.0
    up, down = triples.pair(kept)
    if not bool(values[:1].any()):
        up, down = torch.zeros_like(up), torch.ones_like(down)
    return Pair(entry.site, up, down, scale, missing, size)


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as factor pairs and changed tensors of the base model."""

    pairs: list[Pair]
    heads: dict[str, Tensor]

    @property
    def error(self) -> float:
        """Relative Frobenius error over all sites."""
        whole = sum(pair.size**2 for pair in self.pairs)
        return (sum(pair.missing**2 for pair in self.pairs) / whole) ** 0.5 if whole else 0.0


def flatten(parts: AdapterParts, rank: int | None = None) -> PlainAdapter:
    """Return all sites of an adapter as pairs, and biases and norms at their new values.

    Raises:
        AdapterFileError: a change depends on base weights that are not known.
    """
    pairs = []
    heads = dict(parts.heads)
    for entry in parts.entries:
        if entry.site.kind == "norm":
            name = f"{entry.site.module}.weight"
            heads[name] = _base_value(parts, entry, name) + parts.change(entry).reshape(-1)
        else:
            pairs.append(pair_of(parts, entry, rank))
        _shift_bias(parts, entry, heads)
    return PlainAdapter(pairs, heads)


@torch.no_grad()
def _shift_bias(parts: AdapterParts, entry: Entry, heads: dict[str, Tensor]) -> None:
    """Add a site's change of the bias to the layer's bias."""
    change = entry.delta.bias_change()
    if change is None:
        return
    site = entry.site
    key = site.key if site.key in ("q", "k", "v", "out") else ""
    attention = key and parts.known.tensor(f"{site.module}.in_proj_bias") is not None
    leaf = "bias" if not attention else "out_proj.bias" if key == "out" else "in_proj_bias"
    name = f"{site.module}.{leaf}"
    if name not in heads:
        heads[name] = _base_value(parts, entry, name).clone()
    start = "qkv".index(key) * site.out_features if leaf == "in_proj_bias" else 0
    start = site.rows[0] if site.rows else start
    shifted = heads[name].clone()
    shifted[start : start + site.out_features] += (entry.strength * change).to(shifted.dtype)
    heads[name] = shifted


def _base_value(parts: AdapterParts, entry: Entry, name: str) -> Tensor:
    value = parts.known.tensor(name)
    if value is None:
        raise AdapterFileError(
            f"{entry.method} changes {name}, whose base value is not known: give the state dict of "
            "the base model (--base FILE.safetensors)"
        )
    return value


@torch.no_grad()
def fitting(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return a pair with the same product, of no higher rank than a matrix of its size can have."""
    most = min(up.shape[0], down.shape[1])
    if down.shape[0] <= most:
        return up, down
    dtype = up.dtype
    up, down = singular_triples(up, down).pair(most)
    return up.to(dtype), down.to(dtype)


def scaled(pair: Pair) -> Pair:
    """Return the pair with its scale in the up-matrix."""
    return replace(pair, up=pair.scale * pair.up, scale=1.0)
