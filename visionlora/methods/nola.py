r"""NOLA: LoRA factors as combinations of random bases (Koohpayegani et al. 2024, arXiv 2310.02556).

    Delta W = s * B A,   A = A_0 + sum_{i<=k} alpha_i P_i,   B = sum_{i<=k} beta_i Q_i

    A_0, P_i: r x in,  Q_i: out x r random and frozen,   alpha, beta: k trained,   s = alpha / r

The bases are never stored: they come out of a seeded stream, uniform in +-1, a few matrices at a
time, once in the forward and once more in the backward (`visionlora.ops.generated`). With
`share_basis` all sites of one width use one stream, and one pass over it serves them all in a step;
without, every site has its own. Time grows with k r (in + out), whatever the number of tokens.

Initial values: alpha = beta = 0 and A_0 uniform in +-1/sqrt(in), so the change is zero and beta
moves first; without A_0 zero coefficients are a dead saddle. With plain bases and k = 1024 Adam
moves every entry of A about 30 times as far as its learning rate; `basis="unit"` divides the bases
by sqrt(k), so that LoRA's learning rate transfers. `basis="legacy"` is the code for ViT: no A_0,
alpha = beta = 1/k, bases in +-1/sqrt(r in) and +-1/sqrt(r out), s = 1/r (preset `nola-vit`); the
change is then small but not zero.

Trained: 2 k scalars a site, whatever its shape and rank. Files hold alpha and beta; A_0 and the
streams follow from the seed, and fingerprints of them are compared. Merge: W + s B A.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.methods.parts.cache import GraphCache
from visionlora.ops.generated import combine_generated
from visionlora.registry import register, register_preset
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class NOLAConfig(LowRankConfig):
    """Options of NOLA."""

    method: ClassVar[str] = "nola"

    rank: int = 4
    """Inner dimension r; the number of trained scalars does not depend on it."""
    coefficients: int = 1024
    """Number k of basis matrices of each factor."""
    basis: Literal["plain", "unit", "legacy"] = "plain"
    """Size of the bases: +-1, divided by sqrt(k), or as in the code for ViT."""
    share_basis: bool = True
    """One stream of bases for all sites of one width, instead of one per site."""
    chunk: int = 32
    """How many basis matrices exist at a time."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("coefficients", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"nola: {name} must be at least 1, got {getattr(self, name)}")

    def meaning(self) -> dict[str, Any]:
        """Leave out the size of the pieces."""
        options = super().meaning()
        del options["chunk"]
        return options


class Stream:
    """One seeded stream of basis matrices, and the coefficient vectors that use it."""

    def __init__(self, seed: int, shape: tuple[int, int], bound: float, chunk: int) -> None:
        self.seed, self.shape, self.bound, self.chunk = seed, shape, bound, chunk
        self.users: list[tuple[nn.Module, str]] = []
        self.cache = GraphCache()

    def join(self, module: nn.Module, name: str) -> int:
        """Add the coefficients `module.<name>`; returns their place."""
        self.users.append((module, name))
        return len(self.users) - 1

    def combined(self, place: int) -> Float[Tensor, "height width"]:
        """Return the combination of one user; the first call of a step computes those of all."""
        vectors = [getattr(module, name) for module, name in self.users]
        if torch.compiler.is_compiling():  # a graph is traced once, so nothing outlives it
            return self._combine([vectors[place]])[0]
        return self.cache.get(vectors, lambda: self._combine(vectors), linear=True)[place]

    def first(self) -> Float[Tensor, " few"]:
        """Return the first entries of the stream."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return uniform((min(8, self.shape[0] * self.shape[1]),), self.bound, generator)

    def _combine(self, vectors: list[Tensor]) -> list[Tensor]:
        found: Tensor = combine_generated(
            torch.stack(vectors), *self.shape, self.seed, self.chunk, self.bound
        )
        return list(found.unbind())


class NOLABases(Shared):
    """The streams of all sites, with their first entries as buffers, by which they are checked."""

    def __init__(self, config: NOLAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.options = config
        self.streams: dict[str, Stream] = {}
        for site in sites:
            self._add("A", site, site.in_features, (config.rank, site.in_features))
            self._add("B", site, site.out_features, (site.out_features, config.rank))

    def name(self, factor: str, site: Site) -> str:
        """Return the name of the stream of a factor, `A` or `B`, of a site."""
        width = site.in_features if factor == "A" else site.out_features
        own = width if self.options.share_basis else site.name.replace(".", "_")
        return f"bases_{factor}_{own}"

    def _add(self, factor: str, site: Site, width: int, shape: tuple[int, int]) -> None:
        config, name = self.options, self.name(factor, site)
        if name in self.streams:
            return
        bound = {
            "plain": 1.0,
            "unit": config.coefficients**-0.5,
            "legacy": (config.rank * width) ** -0.5,
        }[config.basis]
        seed = named_generator(config.seed, f"nola.{name}").initial_seed()
        self.streams[name] = Stream(seed, shape, bound, config.chunk)
        self.register_buffer(name, self.streams[name].first(), persistent=False)

    def frozen(self) -> dict[str, Tensor]:
        """The first entries of every stream."""
        return {name: self.get_buffer(name) for name in self.streams}


class NOLA(Delta):
    """Two coefficient vectors."""

    A0: Tensor

    def __init__(self, config: NOLAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        assert isinstance(shared, NOLABases)
        self.options = config
        self.alpha = nn.Parameter(torch.empty(config.coefficients))
        self.beta = nn.Parameter(torch.empty(config.coefficients))
        self.register_buffer("A0", torch.empty(config.rank, site.in_features), persistent=False)
        self._A = shared.streams[shared.name("A", site)]
        self._B = shared.streams[shared.name("B", site)]
        self._places = (self._A.join(self, "alpha"), self._B.join(self, "beta"))

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.basis != "legacy"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A_0 and set the coefficients as the module docstring says."""
        legacy = self.options.basis == "legacy"
        self.A0.copy_(uniform(tuple(self.A0.shape), self.A0.shape[1] ** -0.5, generator))
        if legacy:
            self.A0.zero_()
        for vector in (self.alpha, self.beta):
            vector.fill_(1 / len(vector) if legacy else 0.0)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`."""
        A, B = self._A.combined(self._places[0]), self._B.combined(self._places[1])
        return B, self.A0 + A

    def frozen(self) -> dict[str, Tensor]:
        """The fixed part of A."""
        return {"A0": self.A0}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 2 k."""
        return int(2 * config.coefficients)


register(NOLAConfig, NOLA, NOLABases)
register_preset("nola-vit", "nola", "NOLA as in the code for ViT", basis="legacy", alpha=1.0)
