r"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

    V = W + s * B A,   W' = diag(m / |V|) V,   Delta W = W' - W

`|V|` holds the 2-norm of every row of V (one per output feature) and is a constant in the gradient,
as section 4.3 of the paper has it. m: out, trained, starts at |W|, so that W' = W at first (up to
rounding). B: out x r = 0, A: r x in uniform in +-1/sqrt(in), s = alpha / r.

Few tokens: y = (m / |V|) * (W x + s B A x) + b needs no second product with W, and the row norms
need no out x in matrix:

    |v_i|^2 = |w_i|^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i

Many tokens: W' is formed instead, and the backward needs no dense gradient: with c = m / |V|,
h = x A^T and g = dL/dy,

    dA = s ((g * c) B)^T x,   dB = s (c * g^T h),   dm = sum_t g * (y - b) / m

With dropout only the input of A is dropped, with one base product; PEFT drops the input of W in the
rescaled term as well, which costs a second base product (derived; the two agree without dropout).

Where the pair starts at a part of W, a constant pair is taken off (`methods.parts.pair`), and m
starts at the norms of V.

Trained: r (out + in) + out scalars a site. Merge: W'. Not additive: the change depends on W.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import Form
from visionlora.methods.base import Layer, Shared, reset_zero_pair
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.registry import register
from visionlora.sites import Site

if TYPE_CHECKING:
    from visionlora.init.base import Start


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(PairConfig):
    """Options of DoRA."""

    method: ClassVar[str] = "dora"
    form: ClassVar[Form] = "rescaled"


class DoRA(PairDelta):
    """A factor pair with a trained norm per output feature."""

    def __init__(self, config: DoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.magnitude = nn.Parameter(torch.empty(site.out_features))
        self.add_constant(site.in_features)

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the factors as LoRA does, set m to the row norms of the frozen weight."""
        reset_zero_pair(self.A, self.B, self.kind, generator)
        self.magnitude.copy_(_at_least_float(weight).norm(dim=1))

    @torch.no_grad()
    def begin(self, start: "Start", weight: Float[Tensor, "out in"]) -> None:
        """Take the pair of an initialiser, and set m to the row norms that V has then."""
        super().begin(start, weight)
        up, down = self.inner_pair()
        self.magnitude.copy_(self.row_norms(weight, down, up))

    def factors(self) -> None:
        """Return None: the norm makes more than a pair of the change."""
        return None

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W' - W, with the norm outside the gradient."""
        weight = _at_least_float(weight)
        up, down = (_at_least_float(item) for item in self.inner_pair())
        direction = weight + self.scale * (up @ down)
        norm = direction.detach().norm(dim=1).clamp_min(1e-12)
        return (self.magnitude / norm)[:, None] * direction - weight

    def update(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return `m / |V| * (y + s B A dropout(x))` for the output y without bias."""
        up, down = self.inner_pair()
        hidden = layer.down(
            layer.dropout(x, self.dropout), down.to(x.dtype if x.is_floating_point() else y.dtype)
        )
        y = y + layer.up(hidden, (self.scale * up).to(hidden.dtype))
        ratio = self.magnitude / self.row_norms(layer.weight, down, up)
        return y * layer.per_output(ratio).to(y.dtype)

    contract_uses_output = True

    def contract(
        self,
        weight: Float[Tensor, "out in"],
        x: Float[Tensor, "tokens in"],
        g: Float[Tensor, "tokens out"],
        dots: Float[Tensor, " out"] | None,
        A: Float[Tensor, "rank in"],
        B: Float[Tensor, "out rank"],
        m: Float[Tensor, " out"],
    ) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, " out"]]:
        """Return the gradients of A, B and m as the module docstring has them."""
        norm = self.row_norms(weight, *self._less_constant(A, B))
        ratio = (m / norm)[:, None]
        hidden = g @ (self.scale * ratio * B).to(g.dtype)
        grad_A = (hidden.t() @ x).to(A.dtype)
        grad_B = self.scale * ratio * ((x @ A.to(x.dtype).t()).t() @ g).t().to(B.dtype)
        if dots is None or bool((m.abs() < 1e-6).any()):
            down, up = self._less_constant(A, B)
            direction = weight.to(B.dtype) + self.scale * (up @ down)
            dots, m = ((g.t() @ x).to(B.dtype) * direction).sum(1), norm
        return grad_A, grad_B, dots.to(B.dtype) / m

    def _less_constant(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(down, up)` of the pair inside the norm, from the parameters that were given."""
        if not self.offset:
            return A, B
        return torch.cat([A, self.A0]), torch.cat([B, -self.B0], 1)

    @torch.no_grad()
    def row_norms(
        self,
        weight: Float[Tensor, "out in"],
        A: Float[Tensor, "rank in"],
        B: Float[Tensor, "out rank"],
    ) -> Float[Tensor, " out"]:
        """Return the row norms of V without forming it."""
        weight, A, B = (_at_least_float(item) for item in (weight, A, B))
        cross = ((weight @ A.t()) * B).sum(1)
        gram = ((B @ (A @ A.t())) * B).sum(1)
        base = weight.norm(dim=1).square()
        squared = base + 2 * self.scale * cross + self.scale**2 * gram
        return squared.clamp_min(1e-24).sqrt()

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in) + out."""
        return int(config.rank * (out_features + in_features) + out_features)


def _at_least_float(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


register(DoRAConfig, DoRA)
