r"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv 2310.11454).

    Delta W = diag(b) B diag(d) A,   b: out,  d: r trained;   B: out x r,  A: r x in frozen

A and B are one pair of random matrices for the whole model, as large as its largest site and sliced
for the others. Both are uniform in +-sqrt(6 / fan_in) from one seeded generator, A first. Initial
values: d = 0.1, b = 0, so the change starts at zero.

Trained: r + out scalars a site. Files hold b and d; A and B are drawn again from the seed and their
fingerprint is compared. Merge: W + Delta W.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Options of VeRA."""

    method: ClassVar[str] = "vera"

    rank: int = 256
    """Inner dimension r of the frozen pair."""
    d_initial: float = 0.1
    """Initial value of d."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""

    def meaning(self) -> dict[str, Any]:
        """Leave out the initial value."""
        options = super().meaning()
        del options["d_initial"]
        return options


class VeRABases(Shared):
    """The frozen pair `A: r x max(in)` and `B: max(out) x r`."""

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        widest = max(site.in_features for site in sites)
        tallest = max(site.out_features for site in sites)
        generator = named_generator(config.seed, "vera")
        A = uniform((config.rank, widest), (6 / widest) ** 0.5, generator)
        B = uniform((tallest, config.rank), (6 / config.rank) ** 0.5, generator)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def frozen(self) -> dict[str, Tensor]:
        """Both matrices."""
        return {"A": self.A, "B": self.B}


class VeRA(Delta):
    """Two trained vectors around the frozen pair."""

    def __init__(self, config: VeRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.out_features, self.in_features = site.out_features, site.in_features
        self.b = nn.Parameter(torch.empty(site.out_features))
        self.d = nn.Parameter(torch.empty(config.rank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set b to zero and d to its initial value."""
        self.b.zero_()
        self.d.fill_(self.options.d_initial)

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(diag(b) B, diag(d) A)`, sliced to the site."""
        bases = self._shared[0]
        assert isinstance(bases, VeRABases)
        return (
            self.b[:, None] * bases.B[: self.out_features],
            self.d[:, None] * bases.A[:, : self.in_features],
        )

    def contract(
        self,
        weight: Float[Tensor, "out in"],
        x: Float[Tensor, "tokens in"],
        g: Float[Tensor, "tokens out"],
        dots: Float[Tensor, " out"] | None,
        b: Float[Tensor, " out"],
        d: Float[Tensor, " rank"],
    ) -> tuple[Float[Tensor, " out"], Float[Tensor, " rank"]]:
        """Return `M d` and `M^T b` for `M = (g^T x A^T) * B`, the gradients of b and d."""
        bases = self._shared[0]
        assert isinstance(bases, VeRABases)
        A, B = bases.A[:, : self.in_features], bases.B[: self.out_features]
        M = (g.t() @ (x @ A.to(x.dtype).t())).to(B.dtype) * B
        return M @ d, M.t() @ b

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r + out."""
        return int(config.rank + out_features)


register(VeRAConfig, VeRA, VeRABases)
