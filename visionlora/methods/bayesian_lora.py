r"""Bayesian-LoRA: trained gates on rank and bit width (Meo et al. 2024, arXiv 2406.13046).

    Delta W = s * Q_B(B) diag(E * G) Q_A(A),   B: out x r,  A: r x in,  E: r,   s = alpha / r

Q_A and Q_B are residual quantisers of 2 to 32 bits (`visionlora.ops.quantize`) with four gates and
one range each; G_i = z_2 ... z_i nests the rank gates, the first rank being always on. All gates
are hard concrete (`visionlora.methods.parts.gates`). The loss gets, for every site,

    lambda_bits * sum over A, B of size / largest * sum over b in 4, 8, 16, 32 of b P_4 ... P_b
    + lambda_rank * sum over i of P_1 ... P_i,         P = P(z > 0)

rising over the first 10 % of the run. No reference code is public: form, sizes (number of entries,
which for linear layers are multiply-adds) and warm-in are derived; gates are those of BayesianBits.

Initial values: A uniform in +-1/sqrt(in), B from N(0, 0.02^2), E = 0, so the change starts at zero;
gates open (logit 6); the range is the largest entry, kept as its logarithm (derived), so that it
stays positive. Gates learn 10 times faster; gates and ranges do not decay. Rank gates that start at
logit 6 hardly close at small weights, because the change spreads over all ranks before they do;
from `rank_logit=0` on (derived) the noise of the nested gates orders the ranks early.

Trained: r (out + in) + 2 r - 1 + 10 scalars a site. Noise is drawn while training; evaluation,
merge and files use decided gates and quantised factors. When training is over, closed ranks go, the
factors become their quantised values, and gates and ranges stay fixed; the site stays Bayesian-LoRA
so that its bit widths are known (`visionlora.ranks.bops`, `visionlora.io.integers`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig, LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Group, Shared, uniform
from visionlora.methods.parts import gates
from visionlora.ops.quantize import WIDTHS, residual_quantize
from visionlora.ranks.allocation import resized
from visionlora.ranks.pressure import WarmIn
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class BayesianLoRAConfig(LowRankConfig):
    """Options of Bayesian-LoRA."""

    method: ClassVar[str] = "bayesian-lora"

    lambda_bits: float = 1e-3
    """Weight of the bit widths in the loss."""
    lambda_rank: float = 1e-3
    """Weight of the ranks in the loss."""
    rank_logit: float = gates.INITIAL
    """Initial logit of the rank gates: 6 is open, 0 undecided, so that noise orders the ranks."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("lambda_bits", "lambda_rank"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"bayesian-lora: {name} must not be negative, got {getattr(self, name)}"
                )

    def meaning(self) -> dict[str, Any]:
        """Leave out what matters only in training."""
        options = super().meaning()
        del options["lambda_bits"], options["lambda_rank"], options["rank_logit"]
        return options


class BayesianLoRA(Delta):
    """Two quantised factors with gated ranks between them."""

    stochastic = True
    groups: ClassVar[dict[str, Group]] = {
        "gates_A": Group(lr=10.0, decay=False),
        "gates_B": Group(lr=10.0, decay=False),
        "gates_rank": Group(lr=10.0, decay=False),
        "range_A": Group(decay=False),
        "range_B": Group(decay=False),
    }

    def __init__(
        self, config: BayesianLoRAConfig, site: Site, shared: Shared | None = None
    ) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))
        self.E = nn.Parameter(torch.empty(config.rank))
        self.gates_rank = nn.Parameter(torch.empty(config.rank - 1))
        for name in "AB":
            self.register_parameter(f"gates_{name}", nn.Parameter(torch.empty(len(WIDTHS))))
            self.register_parameter(f"range_{name}", nn.Parameter(torch.empty(1)))
        self.largest = max(self.A.numel(), self.B.numel())
        """Entries of the largest factor of the adapter; set for all sites by the controller."""
        self.pressure = 1.0
        """Share of the penalty that applies; set by the controller."""

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set the values that the module docstring gives."""
        self.A.copy_(uniform(tuple(self.A.shape), self.A.shape[1] ** -0.5, generator))
        self.B.copy_(torch.empty(self.B.shape).normal_(0.0, 0.02, generator=generator))
        self.E.zero_()
        self.gates_rank.fill_(self.options.rank_logit)
        for name in "AB":
            self.get_parameter(f"gates_{name}").fill_(gates.INITIAL)
            largest = self.get_parameter(name).abs().amax().clamp_min(1e-12)
            self.get_parameter(f"range_{name}").fill_(largest.log())

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(Q(B), diag(E * G) Q(A))`, with drawn gates while training."""
        return self.quantized("B"), (self.E * self.rank_gates())[:, None] * self.quantized("A")

    def quantized(self, name: str) -> Tensor:
        """Return Q of the factor `A` or `B`."""
        opened = gates.gate_values(self._gates(name), self.training)
        return residual_quantize(self._factor(name), self.beta(name), opened)

    def beta(self, name: str) -> Float[Tensor, "1"]:
        """Return the end of the range of factor `A` or `B`."""
        return cast(Tensor, getattr(self, f"range_{name}")).exp()

    def rank_gates(self) -> Float[Tensor, " rank"]:
        """Return G."""
        values = gates.gate_values(self.gates_rank, self.training)
        return gates.nested(torch.cat([torch.ones_like(self.E[:1]), values]))

    def bits(self, name: str) -> int:
        """Return the decided bit width of factor `A` or `B`."""
        opened = gates.is_open(self._gates(name))
        return (2, *WIDTHS)[int(opened.int().cumprod(0).sum())]

    @property
    def effective_rank(self) -> int:
        """Decided number of ranks."""
        return 1 + int(gates.is_open(self.gates_rank).int().cumprod(0).sum())

    def penalty(self) -> Tensor:
        """Return the expected bits and ranks, weighted."""
        ranks = gates.nested(gates.open_probability(self.gates_rank)).sum() + 1.0
        result = self.options.lambda_rank * ranks
        for name in "AB":
            opened = gates.nested(gates.open_probability(self._gates(name)))
            expected = (opened * opened.new_tensor(WIDTHS)).sum()
            share = self._factor(name).numel() / self.largest
            result = result + self.options.lambda_bits * share * expected
        return self.pressure * result

    def _factor(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))

    def _gates(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, f"gates_{name}"))

    @torch.no_grad()
    def settled(self, build: Callable[[AdapterConfig], Delta]) -> Delta | None:
        """Return this change without closed ranks, its factors quantised and its gates fixed."""
        logits = [self.gates_rank, *(self._gates(name) for name in "AB")]
        if all(torch.equal(phi, gates.certain(phi)) for phi in logits):
            return None
        rank = self.effective_rank
        made = build(resized(self.options, rank))
        quantized = {name: self.eval().quantized(name) for name in "AB"}
        values = {
            "A": quantized["A"][:rank],
            "B": quantized["B"][:, :rank],
            "E": self.E[:rank],
            "gates_rank": gates.certain(self.gates_rank[: rank - 1]),
            **{f"gates_{n}": gates.certain(self._gates(n)) for n in "AB"},
            **{f"range_{n}": self.get_parameter(f"range_{n}") for n in "AB"},
        }
        for name, value in values.items():
            parameter = made.get_parameter(name)
            parameter.copy_(value)
            trained = self.get_parameter(name).requires_grad and name not in self.groups
            parameter.requires_grad_(trained)
        return made

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in) + 2 r - 1 + 10."""
        return int(config.rank * (out_features + in_features + 2) - 1 + 2 * (len(WIDTHS) + 1))


register(BayesianLoRAConfig, BayesianLoRA, controller=WarmIn)
