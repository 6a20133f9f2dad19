r"""RandLoRA: full-rank changes from scaled random bases (Albert et al. 2025, arXiv 2502.00987).

    Delta W = s * sum_{n=1..N} B_n diag(Lambda_n) A diag(Gamma_n),   N = ceil(m / r)

    A: r x m,  B_n: M x r frozen,   Lambda_n: r,  Gamma_n: m trained,   m, M = min, max of (out, in)

written for in <= out; for in > out the product is transposed, so that Gamma lies on the small side.
With `V = [diag(Lambda_n) A diag(Gamma_n)]` stacked to rN x m and `U = [B_1 ... B_N]`, M x rN, the
sum is one product, `Delta W = s U V`, and its rank reaches m. A smaller r has more parameters.

A and all B are one pair for the whole model, as large as its largest sites and sliced for the
others, drawn from one seeded generator, A first, with unit variance: uniform, or -1, 0, +1 with
P(-1) = P(+1) = 1 / 2q before scaling, q = 3 (`sparse`) or sqrt(m) (`very-sparse`). The variance is
that of the law, not of the sample (derived). A column of a sparse A is all zero with probability
(1 - 1/q)^r, and its feature then never changes: sparse bases want a large r. `layout="peft"` pairs
the columns of U in (n, k) order with the rows of V in (k, n) order, as PEFT does: another draw of
the same law.

Initial values: Lambda = 0 and Gamma = 1 / max(N, m); `init="gamma"`: Gamma = 0 and
Lambda = 1 / max(N, r), as in the vision code. The change starts at zero. s = alpha / r with
alpha = 20 r unless given; the code for CLIP has alpha = 1 (preset `rand-lora-clip`). A large alpha
diverges with a large learning rate: 1e-3 goes with alpha = 1, about 1e-4 with 20 r.

Trained: N (r + m) scalars a site. Files hold Lambda and Gamma; A and B are drawn again from the
seed and their fingerprint is compared. Merge: W + Delta W.

Cost: U is frozen, so a step of T tokens through the factors needs `T m (M + 2 m)` multiply-adds
and one product of M m^2, and keeps `x U` instead of a wide input; forming the change needs `T M m`
and three products of M m^2. The host takes the cheaper one. Building V keeps A, Lambda, Gamma only.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.registry import register, register_preset
from visionlora.sites import Site, named_generator

Layout = Literal["paper", "peft"]


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(AdapterConfig):
    """Options of RandLoRA."""

    method: ClassVar[str] = "rand-lora"

    rank: int = 32
    """Rows r of the basis A; a smaller r trains more parameters."""
    alpha: float | None = None
    """Numerator of the scale s = alpha / r; None means `20 * rank`."""
    layout: Layout = "paper"
    """Pairing of columns and rows of the stacked bases; `peft` is what PEFT computes."""
    bases: Literal["dense", "sparse", "very-sparse"] = "dense"
    """Law of the random bases: uniform, or mostly zeros."""
    init: Literal["lambda", "gamma"] = "lambda"
    """Which of the two diagonals starts at zero."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""

    @property
    def scale(self) -> float:
        """The factor s in front of the sum."""
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def meaning(self) -> dict[str, Any]:
        """Return the options, with the scale in place of alpha."""
        options = super().meaning()
        del options["alpha"]
        return {**options, "scale": self.scale}

    def check_site(self, site: Site) -> None:
        """Refuse a basis with more rows than the site has on its small side."""
        check_rank(self.method, self.rank, site)


class RandLoRABases(Shared):
    """The frozen pair: `A`, and all `B_n` side by side."""

    A: Tensor
    B: Tensor

    def __init__(self, config: RandLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        largest = (max(s.out_features for s in sites), max(s.in_features for s in sites))
        small, big = min(largest), max(largest)
        generator = named_generator(config.seed, "rand-lora")
        zeros = {"dense": 0.0, "sparse": 3.0, "very-sparse": small**0.5}[config.bases]
        A = _unit_variance((config.rank, small), zeros, generator)
        B = _unit_variance(
            (big, number_of_bases(config.rank, small) * config.rank), zeros, generator
        )
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def frozen(self) -> dict[str, Tensor]:
        """Both matrices."""
        return {"A": self.A, "B": self.B}


class RandLoRA(Delta):
    """The trained diagonals around the frozen bases."""

    def __init__(self, config: RandLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.wide = site.in_features > site.out_features
        self.frozen_factor = "down" if self.wide else "up"
        self.small = min(site.out_features, site.in_features)
        self.big = max(site.out_features, site.in_features)
        bases = number_of_bases(config.rank, self.small)
        self.Lambda = nn.Parameter(torch.empty(config.rank, bases))
        self.Gamma = nn.Parameter(torch.empty(bases, self.small))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set one diagonal to zero and the other to its constant."""
        zero, other = self.Lambda, self.Gamma
        if self.options.init == "gamma":
            zero, other = other, zero
        zero.zero_()
        other.fill_(1 / max(other.shape))

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return `s U V`, or its transpose, as one product."""
        U, V = self._stacked(self.scale)
        return V.t() @ U.t() if self.wide else U @ V

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return the stacked bases; the host decides by cost whether to form the change."""
        U, V = self._stacked(1.0)
        return (V.t(), U.t()) if self.wide else (U, V)

    def _stacked(self, scale: float) -> tuple[Tensor, Tensor]:
        """Return U and V, sliced to the site."""
        bases = self._shared[0]
        assert isinstance(bases, RandLoRABases)
        U = bases.B[: self.big, : self.Lambda.numel()]
        V = _ScaledBases.apply(
            bases.A[:, : self.small], scale * self.Lambda, self.Gamma, self.options.layout
        )
        return U, V.flatten(0, 1)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return N (r + m)."""
        small = min(out_features, in_features)
        return int(number_of_bases(config.rank, small) * (config.rank + small))


def number_of_bases(rank: int, small: int) -> int:
    """Return N: the fewest bases of `rank` whose sum has rank `small`."""
    return -(-small // rank)


def _unit_variance(
    shape: tuple[int, ...], zeros: float, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Draw entries of variance 1: uniform, or nonzero with probability 1 / `zeros`."""
    if zeros == 0.0:
        return uniform(shape, 3**0.5, generator)
    draw = torch.rand(shape, generator=generator)
    signs = (draw > 1 - 0.5 / zeros).float() - (draw < 0.5 / zeros).float()
    return zeros**0.5 * signs


class _ScaledBases(torch.autograd.Function):
    """`V[n, k] = Lambda[k, n] A[k] Gamma[n]`, or in (k, n) order; keeps only its three inputs."""

    @staticmethod
    def forward(ctx, A, Lambda, Gamma, layout):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(A, Lambda, Gamma)
        ctx.layout = layout
        if layout == "paper":
            return (Lambda.t()[:, :, None] * A).mul_(Gamma[:, None])
        return (Lambda[:, :, None] * A[:, None]).mul_(Gamma)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        A, Lambda, Gamma = ctx.saved_tensors
        weighted = (g if ctx.layout == "paper" else g.transpose(0, 1)) * A  # (n, k, j)
        grad_lambda = torch.einsum("nkj,nj->kn", weighted, Gamma)
        grad_gamma = torch.einsum("nkj,kn->nj", weighted, Lambda)
        return None, grad_lambda, grad_gamma, None


register(RandLoRAConfig, RandLoRA, RandLoRABases)
register_preset(
    "rand-lora-clip", "rand-lora", "RandLoRA with s = 1 / r and Gamma = 0", init="gamma", alpha=1.0
)
