r"""TinyLoRA: a few coefficients between singular vectors (Morris et al. 2026, arXiv 2602.04118).

    Delta W_l = B R_l A,   R_l = sum_i v_i P_i,   i = 1 .. u
    B = U_r sqrt(S_r): out x r,  A = sqrt(S_r) V_r^T: r x in,  P_i: r x r frozen;   v: u trained

with W = U S V^T. The entries of P come from N(0, 1/r), drawn from the seed and the site's name.

`weight_tying` t in [0, 1] lets sites share v: L sites in model order are cut into
max(1, round(L (1 - t))) groups of consecutive ones, so t = 0 gives every site its own v and t = 1
one v to the whole model. A and P belong to the site either way.

Initial values: `init="uniform"`: v uniform in +-0.02, a small change. `init="zero"`, the default of
PEFT: v = 0 and no change; the gradient of v does not vanish there, because R is linear in v.

Trained: u scalars a group, nothing else. Files hold v; A and B are computed again from the frozen
weight (float64, fixed signs), P is drawn again, and their fingerprints are compared. Where singular
values are equal or nearly so, or the base model has another precision, the factors may come out
differently: such a file is refused with the advice to save with `save(..., frozen=True)`, which
stores A, B and P. Merge: W + B R A.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, check_rank
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.methods.parts.decompose import truncated_svd
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(AdapterConfig):
    """Options of TinyLoRA."""

    method: ClassVar[str] = "tiny-lora"

    rank: int = 2
    """Number r of singular vectors."""
    coefficients: int = 64
    """Length u of the trained vector of a group."""
    weight_tying: float = 0.0
    """0: every site has its own vector. 1: all sites share one."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""
    init: Literal["uniform", "zero"] = "uniform"
    """`uniform`: v in +-0.02. `zero`: v = 0, so that nothing changes at first."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("rank", "coefficients"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"tiny-lora: {name} must be at least 1, got {getattr(self, name)}"
                )
        if not 0.0 <= self.weight_tying <= 1.0:
            raise ConfigError(
                f"tiny-lora: weight_tying must lie in [0, 1], got {self.weight_tying}"
            )

    def check_site(self, site: Site) -> None:
        """Refuse a rank that the site cannot have."""
        check_rank(self.method, self.rank, site)


class TinyVectors(Shared):
    """The trained vectors `v: groups x u`, and which site has which."""

    depends_on_all_sites = True

    def __init__(self, config: TinyLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        groups = _group_count(config, len(sites))
        size = len(sites) // groups
        self.group = {site.name: min(i // size, groups - 1) for i, site in enumerate(sites)}
        shape = (groups, config.coefficients)
        generator = named_generator(config.seed, "tiny-lora")
        zero = config.init == "zero"
        self.v = nn.Parameter(torch.zeros(shape) if zero else uniform(shape, 0.02, generator))

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return u for every group."""
        return int(config.coefficients * _group_count(config, len(sites)))


class TinyLoRA(Delta):
    """Frozen singular vectors and frozen directions of the core."""

    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, config: TinyLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.site_name = site.name
        rank = config.rank
        for name, shape in (
            ("A", (rank, site.in_features)),
            ("B", (site.out_features, rank)),
            ("P", (config.coefficients, rank, rank)),
        ):
            self.register_buffer(name, torch.empty(shape), persistent=False)

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "zero"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Decompose the weight and draw P."""
        U, S, V = truncated_svd(weight, self.options.rank, self.site_name or "the layer")
        self.A.copy_(S.sqrt()[:, None] * V)
        self.B.copy_(U * S.sqrt())
        spread = self.options.rank**-0.5
        self.P.copy_(torch.empty(self.P.shape).normal_(0.0, spread, generator=generator))

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B R, A)`."""
        (vectors,) = self.shared
        assert isinstance(vectors, TinyVectors)
        v = vectors.v[vectors.group[self.site_name]]
        return self.B @ torch.einsum("u,uij->ij", v, self.P), self.A

    def frozen(self) -> dict[str, Tensor]:
        """The factors of the weight and the directions."""
        return {"A": self.A, "B": self.B, "P": self.P}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 0: what is trained belongs to the groups."""
        return 0


def _group_count(config: TinyLoRAConfig, sites: int) -> int:
    return max(1, round(sites * (1.0 - config.weight_tying)))


register(TinyLoRAConfig, TinyLoRA, TinyVectors)
