r"""LoLDU: train the diagonal of the weight's LDU decomposition (Shi et al. 2024, arXiv 2410.13618).

    W = P L diag(d) U,   P L: out x k,  U: k x in,  k = min(out, in)
    Delta W = (P L)_r diag(s z - s_0 d_r) U_r,   z: r trained;  s = s_0 = alpha / r

P L is the permuted unit lower triangle of Gaussian elimination with row pivoting, U the unit upper
one, d the pivots. A rank r < k takes the first r pivots, which are not the largest ones: they come
in the order of elimination. The published form trains W' = R + s P L diag(z) U around a residual R;
this is the same function, without overwriting W and without its cancellation.

Initial values: `init="lu"`: z = d, no change. The other ones of the reference replace z and start
from a changed weight: `constant` mean(d), `normal` N(mean d, std d), `uniform` +-|mean d| / 2,
`s_normal` N(0, 1), `s_uniform` +-1, `ones`, `zeros`. `rank=None` means k, `alpha=None` means s = 1
(derived; the reference has s = 1/768). `train_scale` trains s too.

Trained: r scalars a site, and one more with `train_scale`; weight decay leaves them alone, because
it would pull z to 0 instead of d. Where a pivot vanishes (singular W), its row of U stays undivided
and counts as d = 1.

Frozen: d and the two factors, at full rank as large as W each. Files hold z; the factors are
computed again from W (float64) and compared by fingerprint. Equal pivots, or a base model in
another precision, may lead to another permutation: such a file is refused with the advice to save
with `save(..., frozen=True)`, which stores the factors. Merge: W + Delta W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Group, Shared, uniform
from visionlora.methods.parts.decompose import ldu
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoLDUConfig(AdapterConfig):
    """Options of LoLDU."""

    method: ClassVar[str] = "loldu"

    rank: int | None = None
    """Number r of trained pivots; None means all of them."""
    alpha: float | None = None
    """Numerator of the scale s = alpha / r; None means r, so that s = 1."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""
    train_scale: bool = False
    """Train s as well."""
    init: Literal[
        "lu", "constant", "normal", "uniform", "s_normal", "s_uniform", "ones", "zeros"
    ] = "lu"
    """Initial value of z; only `lu` starts at the frozen weight."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.alpha == 0:
            raise ConfigError("loldu: alpha must not be 0, or z is not trained")

    def check_site(self, site: Site) -> None:
        """Refuse more pivots than the site has."""
        check_rank(self.method, self.rank or 1, site)


class LoLDU(Delta):
    """Trained pivots between frozen triangles."""

    groups: ClassVar[Mapping[str, Group]] = {"z": Group(decay=False), "s": Group(decay=False)}
    L: Tensor
    d: Tensor
    U: Tensor

    def __init__(self, config: LoLDUConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.where = site.name or "the layer"
        # The diagonal goes to the factor on the smaller side of the weight.
        self.frozen_factor = "down" if site.in_features > site.out_features else "up"
        rank = config.rank or site.max_rank
        self.initial_scale = 1.0 if config.alpha is None else config.alpha / rank
        self.z = nn.Parameter(torch.empty(rank))
        if config.train_scale:
            self.s = nn.Parameter(torch.empty(1))
        for name, shape in (
            ("L", (site.out_features, rank)),
            ("d", (rank,)),
            ("U", (rank, site.in_features)),
        ):
            self.register_buffer(name, torch.empty(shape), persistent=False)

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "lu"

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """Whether the initial values depend on the seed."""
        return self.options.init in ("normal", "uniform", "s_normal", "s_uniform")

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Decompose the weight and set z (and s)."""
        rank = len(self.z)
        L, d, U = ldu(weight, self.where)
        self.L.copy_(L[:, :rank])
        self.d.copy_(d[:rank])
        self.U.copy_(U[:rank])
        self.z.copy_(self._initial(self.d, generator))
        if self.options.train_scale:
            self.s.fill_(self.initial_scale)

    def _initial(self, d: Tensor, generator: torch.Generator) -> Tensor:
        """Return the initial z of the option `init`."""
        shape, mean = tuple(d.shape), float(d.mean())
        match self.options.init:
            case "lu":
                return d
            case "constant":
                return torch.full(shape, mean)
            case "normal":
                spread = float(d.std(correction=0))
                return torch.empty(shape).normal_(mean, spread, generator=generator)
            case "uniform":
                return uniform(shape, abs(mean) / 2, generator)
            case "s_normal":
                return torch.empty(shape).normal_(generator=generator)
            case "s_uniform":
                return uniform(shape, 1.0, generator)
            case "ones":
                return torch.ones(shape)
            case "zeros":
                return torch.zeros(shape)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return P L and U, one of them times diag(s z - s_0 d)."""
        s = self.s if self.options.train_scale else self.initial_scale
        diagonal = s * self.z - self.initial_scale * self.d
        if self.frozen_factor == "down":
            return self.L * diagonal, self.U
        return self.L, diagonal[:, None] * self.U

    def frozen(self) -> dict[str, Tensor]:
        """The decomposition of the weight."""
        return {"L": self.L, "d": self.d, "U": self.U}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r, and one more if the scale is trained."""
        return int(config.rank or min(out_features, in_features)) + int(config.train_scale)


register(LoLDUConfig, LoLDU)
