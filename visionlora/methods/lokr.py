r"""LoKr: low-rank Kronecker product (Yeh et al. 2023, arXiv 2309.14859).

    Delta W = s * w1 (x) w2,   w1: a x c,   w2: b x e,   out = a b,   in = c e,   s = alpha / r

w2 is one matrix if r >= max(b, e) / 2, else the product w2_a w2_b with w2_a: b x r, w2_b: r x e.
The dimensions are cut as near to the square root as their divisors allow, the smaller part for w1:
768 = 24 * 32, a prime p = 1 * p. A convolution cuts its input channels and leaves the kernel to w2,
so e is a multiple of kh kw, which does not count in the rule for r.

Initial values: `init="w1"`: w1 = 0, and w2 or its factors uniform in +-1/sqrt of their columns.
`init="w2"`, as LyCORIS has it: w2 or w2_b is zero, the others uniform likewise. Zero change either
way. Trained: a c + b e, or a c + r (b + e), scalars a site. Merge: W + Delta W.

Fast path, with the input x cut into rows X: c x e: y += s w1 X w2^T. It takes c e b + a c b
multiplications a token instead of out in (43 k instead of 590 k at 768 x 768), fewer with the
factors, and is used where three of them are cheaper than the weight gradient that the dense change
costs. An Embedding looks up one column of w1 and one of w2 a token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Layer, Shared, uniform
from visionlora.methods.parts.kronecker import columns, mix, split
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    """Options of LoKr."""

    method: ClassVar[str] = "lokr"

    rank: int = 8
    """Inner dimension r of w2; from max(b, e) / 2 on, w2 is one matrix."""
    alpha: float | None = None
    """Numerator of the scale; None means `rank`, so that the scale is 1."""
    factor: int | None = None
    """Rows and columns of w1 where it divides; None: as near to the square root as possible."""
    init: Literal["w1", "w2"] = "w1"
    """Which part starts at zero."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.factor is not None and self.factor < 1:
            raise ConfigError(f"lokr: factor must be at least 1 or None, got {self.factor}")

    @property
    def scale(self) -> float:
        """The constant s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def meaning(self) -> dict[str, Any]:
        """Return the options, with the scale in place of the numerator."""
        options = super().meaning()
        del options["alpha"]
        return {**options, "scale": self.scale}


@dataclass(frozen=True)
class Shape:
    """How a site is cut: `out = a b`, `in = c e`; and the inner dimension of w2, 0 for none."""

    a: int
    b: int
    c: int
    e: int
    rank: int

    @staticmethod
    def of(config: LoKrConfig, out_features: int, in_features: int, kernel: int = 1) -> "Shape":
        """Cut a site whose view has `kernel` columns per input channel."""
        a, b = split(out_features, config.factor)
        c, channels = split(in_features // kernel, config.factor)
        whole = 2 * config.rank >= max(b, channels)
        return Shape(a, b, c, channels * kernel, 0 if whole else config.rank)

    @property
    def count(self) -> int:
        """Number of trained scalars."""
        return self.a * self.c + (self.rank * (self.b + self.e) if self.rank else self.b * self.e)

    @property
    def costs(self) -> tuple[int, int]:
        """Multiplications a token: w2 (or w2_b) applied first, and w1 applied first."""
        a, b, c, e = self.a, self.b, self.c, self.e
        if self.rank:
            return self.rank * (c * e + a * c + a * b), a * c * e + self.rank * a * (e + b)
        return c * e * b + a * c * b, a * c * e + a * e * b


class LoKr(Delta):
    """A Kronecker product of one small matrix and one that may be factored."""

    def __init__(self, config: LoKrConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        self.shape = Shape.of(config, site.out_features, site.in_features, site.kernel)
        shape = self.shape
        self.w1 = nn.Parameter(torch.empty(shape.a, shape.c))
        if shape.rank:
            self.w2_a = nn.Parameter(torch.empty(shape.b, shape.rank))
            self.w2_b = nn.Parameter(torch.empty(shape.rank, shape.e))
        else:
            self.w2 = nn.Parameter(torch.empty(shape.b, shape.e))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw all parts but the one that starts at zero."""
        last = "w2_b" if self.shape.rank else "w2"
        for name, part in self.named_parameters():
            if name == (last if self.options.init == "w2" else "w1"):
                part.zero_()
            else:
                part.copy_(uniform(tuple(part.shape), part.shape[1] ** -0.5, generator))

    def second(self) -> Float[Tensor, "b e"]:
        """Return w2."""
        return self.w2_a @ self.w2_b if self.shape.rank else self.w2

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return s * w1 (x) w2."""
        return torch.kron(self.scale * self.w1, self.second())

    @property
    def update(self) -> Any:
        """The path that never forms the change, where there is one and it is cheaper."""
        if self.kind == "embedding":
            return self._look_up
        shape = self.shape
        dense = shape.a * shape.b * shape.c * shape.e
        return self._cut if self.kind == "linear" and 3 * min(shape.costs) < dense else None

    def _look_up(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Add the columns `x` of the change."""
        return y + columns(self.scale * self.w1, self.second(), x).to(y.dtype)

    def _cut(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return `y + s w1 X w2^T` in the cheaper order."""
        shape = self.shape
        w1 = (self.scale * self.w1).to(y.dtype)
        second = [self.w2_b, self.w2_a] if shape.rank else [self.w2]
        parts = [part.to(y.dtype) for part in second]
        z = x.unflatten(-1, (shape.c, shape.e))
        if shape.costs[0] <= shape.costs[1]:
            z = mix(w1, F.linear(z, parts[0]))
        else:
            z = F.linear(mix(w1, z), parts[0])
        for part in parts[1:]:
            z = F.linear(z, part)
        return y + z.flatten(-2)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return a c + b e or a c + r (b + e)."""
        return Shape.of(config, out_features, in_features).count

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return the count of a site, whose kernel is left to w2."""
        return Shape.of(config, site.out_features, site.in_features, site.kernel).count


register(LoKrConfig, LoKr)
