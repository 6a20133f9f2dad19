r"""MoE-LoRA: a router mixes several LoRA experts (LoRAMoE: Dou et al. 2023, arXiv 2312.09979).

    y = W x + b + s * sum_e g_e(x) B_e A_e dropout(x),   A_e: r x in,  B_e: out x r,  s = alpha / r
    g(x) = softmax(W_g x),   W_g: E x in

`top_k=None`: all experts, as LoRAMoE mixes them. `top_k=k`: the softmax over the k largest logits
only, which is the full softmax cut and normalised again, as in MixLoRA (Li et al. 2024, arXiv
2404.15159). The router runs in at least float32 and sees x before dropout. `granularity="token"`
gates every token (every output position of a convolution); `"sample"` averages the logits over the
tokens of a sample, the first dimension of the input (derived). On a grouped convolution the logits
are averaged over the groups, so that all groups share one gate (derived).

Initial values: every pair as in LoRA, so the change is zero; W_g from N(0, 0.02^2) with
`init="normal"`, or uniform in +-1/sqrt(in) with `init="kaiming"`, as LoRAMoE has it.

Balance, a penalty of weight `balance_weight`, over the tokens of a forward: `balance="load"`:
E sum_e f_e P_e, which is 1 for a uniform router; P_e is the mean probability and f_e the share of
choices that fell on e (without top-k, f = P). `balance="importance"`: the squared coefficient of
variation of sum g_e, LoRAMoE's loss without its task types. If a layer runs several times in one
forward, its last run counts.

Computed as one product with the stacked A (E r rows), a product with the gates, and one with the
stacked B: for small r that is faster than gathering tokens by expert, also for top-k.

Trained: E r (in + out) + E in scalars a site. Not mergeable: the change depends on the input.
`visionlora.freeze.freeze_routing` replaces the gates by their means on given data, which gives a
plain LoRA of rank E r: exact if the gates were constant, an approximation otherwise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Layer, Shared, reset_zero_pair, uniform
from visionlora.methods.parts.recompute import Latest, in_backward
from visionlora.methods.parts.routing import (
    RoutedDelta,
    features_back,
    features_last,
    full_precision,
    top_softmax,
)
from visionlora.registry import register, register_preset
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class MoELoRAConfig(LowRankConfig):
    """Options of MoE-LoRA."""

    method: ClassVar[str] = "moe-lora"

    rank: int = 4
    """Inner dimension r of every expert."""
    experts: int = 8
    """Number of experts E."""
    top_k: int | None = None
    """How many experts a token uses; None means all."""
    granularity: Literal["token", "sample"] = "token"
    """What is routed: every token, or every sample as a whole."""
    init: Literal["normal", "kaiming"] = "normal"
    """Distribution of the router's initial weights."""
    balance: Literal["load", "importance"] = "load"
    """Form of the balance penalty."""
    balance_weight: float = 0.0
    """Weight of the balance penalty in the training loss."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.experts < 1:
            raise ConfigError(f"moe-lora: experts must be at least 1, got {self.experts}")
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"moe-lora: top_k must lie in 1..{self.experts}, the number of experts, or be "
                f"None, got {self.top_k}"
            )
        if self.balance_weight < 0:
            raise ConfigError(
                f"moe-lora: balance_weight must not be negative, got {self.balance_weight}"
            )

    def meaning(self) -> dict[str, Any]:
        """Leave out the penalty."""
        options = super().meaning()
        del options["balance"], options["balance_weight"]
        return options


class MoELoRA(RoutedDelta):
    """Stacked factor pairs and a linear router."""

    def __init__(self, config: MoELoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.kind = site.kind
        experts, rank = config.experts, config.rank
        self.A = nn.Parameter(torch.empty(experts, rank, site.in_features))
        self.B = nn.Parameter(torch.empty(experts, site.out_features, rank))
        self.router = nn.Parameter(torch.empty(experts, site.in_features))
        self._balance = Latest()

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw one pair after the other as LoRA does, then the router."""
        for A, B in zip(self.A, self.B, strict=True):
            reset_zero_pair(A, B, self.kind, generator)
        shape = tuple(self.router.shape)
        if self.options.init == "normal":
            self.router.copy_(torch.empty(shape).normal_(0.0, 0.02, generator=generator))
        else:
            self.router.copy_(uniform(shape, shape[1] ** -0.5, generator))

    def update(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return the output y without bias plus the gated sum of the experts."""
        gates = self.route(x, layer)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        hidden = layer.down(layer.dropout(x, self.dropout), self.A.flatten(0, 1).to(dtype))
        rows = features_last(hidden, layer, self.A.shape[0] * self.A.shape[1])
        parts = rows.unflatten(-1, self.A.shape[:2]) * gates[..., None, :, None].to(hidden.dtype)
        up = (self.scale * self.B).movedim(0, 1).flatten(1)
        return y + layer.up(features_back(parts.flatten(-2), layer), up.to(hidden.dtype))

    def route(self, x: Tensor, layer: Layer) -> Float[Tensor, "*tokens experts"]:
        """Return the gates of every token of a layer's input, in at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            matrix = full_precision(self.router)
            source = full_precision(x)
            if source.is_floating_point():
                matrix = matrix.to(source.dtype)
            logits = features_last(layer.down(source, matrix), layer, len(matrix)).mean(-2)
            if self.options.granularity == "sample":
                logits = _mean_over_tokens(logits, layer)
            gates, chosen = top_softmax(logits, self.options.top_k)
            self._measure(logits, gates, chosen)
        return gates

    def _measure(self, logits: Tensor, gates: Tensor, chosen: Tensor) -> None:
        """Note the balance of this forward, and the gates if they are watched."""
        if self.watch is not None:
            self.watch.add(gates)
        if self.options.balance_weight and self.training:
            value = self.balance(logits, gates, chosen)
            if not in_backward():  # a checkpoint runs this again, and expects the same products
                self._balance.value = value

    def balance(self, logits: Tensor, gates: Tensor, chosen: Tensor) -> Float[Tensor, ""]:
        """Return the balance term of one forward, without its weight."""
        if self.options.balance == "importance":
            importance = gates.flatten(0, -2).sum(0)
            return importance.var(correction=0) / importance.mean().square()
        probability = logits.softmax(-1).flatten(0, -2).mean(0)
        share = probability
        if self.options.top_k is not None:
            share = chosen.to(gates.dtype).flatten(0, -2).mean(0) / self.options.top_k
        return self.options.experts * (share * probability).sum()

    def penalty(self) -> Tensor | None:
        """Return the weighted balance of the last training forward, once."""
        value = self._balance.take()
        return None if value is None else self.options.balance_weight * value

    def frozen_factors(
        self, gates: Float[Tensor, " experts"]
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return the experts side by side, each B_e times its gate."""
        up = gates.to(self.B.dtype)[:, None, None] * self.B
        return up.movedim(0, 1).flatten(1), self.A.flatten(0, 1)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return E r (in + out) + E in."""
        return int(config.experts * (config.rank * (in_features + out_features) + in_features))


def _mean_over_tokens(logits: Tensor, layer: Layer) -> Tensor:
    """Average over all dimensions between the sample and the logits, which stay as size 1."""
    tokens = (-3, -2) if layer.kind == "conv" else tuple(range(1, logits.dim() - 1))
    return logits.mean(tokens, keepdim=True) if tokens else logits


register(MoELoRAConfig, MoELoRA)
register_preset(
    "mixlora",
    "moe-lora",
    "MoE-LoRA with the two best of eight experts and MixLoRA's balance loss, one router per layer",
    rank=8,
    experts=8,
    top_k=2,
    balance_weight=1e-3,
)
