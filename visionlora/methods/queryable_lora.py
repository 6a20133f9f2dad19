r"""Queryable LoRA: shared r x r atoms, mixed by what a block and earlier ones saw (derived).

    Delta W(x) = s * B R_b(x) A,   R_b = sum_k a_k M_k,   B: out x r,  A: r x in,  s = alpha / r
    u_b = mean over tokens of A x at the first layer of block b that runs
    c_b = sum_{j<b} softmax_j(<W_s u_b, W_s u_j> / sqrt d) W_c u_j,   c_1 = 0
    z_k = <W_q [LN(u_b); c_b], kappa_k> / sqrt d + eta log pi_k,   a = softmax(4 largest z)
    pi = softmax(K W_pi t / tau) for an instruction t, else uniform

Only an outline of the method is public, so everything here is a choice. A block is `block_size`
neighbouring transformer blocks of a tower (see `visionlora.methods.parts.depth`); a layer outside
of blocks is a block of its own, without a past. Every sample has its own a; the first dimension of
every adapted layer's input is the batch. Since a is convex, |R_b| never exceeds the largest |M_k|.

Initial values: A and B as in LoRA, so the change is zero; M_k = I + 0.02 N(0, 1), keys kappa_k
N(0, 1/d), the matrices W uniform in +-1/sqrt(fan-in). LN has no parameters, and the routing runs
in at least float32 on x before dropout. Penalty: `divergence` times KL(a | pi), averaged over
samples and blocks.

Trained: r (out + in) a site; once K r^2 + d K + d (r + d) + 2 d r + d |t| for K atoms of query
width d, where W_s, W_c and the part of W_q for c only exist if some tower has two blocks. Not
mergeable: `visionlora.freeze.freeze_routing` fixes a at its mean on given data, which gives a plain
LoRA with up-matrix B R_b.

Correct under gradient checkpointing with use_reentrant=False; the reentrant kind is refused.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Layer, Shared, reset_zero_pair, uniform
from visionlora.methods.parts.depth import Depth, Pass, blocks_of, fit, is_deep
from visionlora.methods.parts.recompute import in_backward, kept_for_backward
from visionlora.methods.parts.routing import (
    RoutedDelta,
    by_sample,
    features_back,
    features_last,
    full_precision,
    top_softmax,
)
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class QueryableLoRAConfig(LowRankConfig):
    """Options of Queryable LoRA."""

    method: ClassVar[str] = "queryable-lora"

    atoms: int = 16
    """Number of shared atoms K."""
    width: int = 32
    """Width d of queries and keys."""
    top_k: int = 4
    """How many atoms a block mixes; K if that is fewer."""
    block_size: int = 4
    """Transformer blocks that share one routed operator."""
    instruction: tuple[float, ...] = ()
    """Embedding t of the task's instruction; empty for none."""
    prior_strength: float = 1.0
    """Weight eta of the instruction prior."""
    temperature: float = 1.0
    """Temperature tau of the instruction prior."""
    divergence: float = 0.01
    """Weight of the penalty KL(a | pi)."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        if isinstance(self.instruction, list):  # as files and command lines have it
            object.__setattr__(self, "instruction", tuple(self.instruction))
        super().__post_init__()
        for option in ("atoms", "width", "top_k", "block_size"):
            if getattr(self, option) < 1:
                value = getattr(self, option)
                raise ConfigError(f"queryable-lora: {option} must be at least 1, got {value}")
        if self.temperature <= 0:
            raise ConfigError(
                f"queryable-lora: temperature must be positive, got {self.temperature}"
            )
        if self.divergence < 0:
            raise ConfigError(
                f"queryable-lora: divergence must not be negative, got {self.divergence}"
            )

    def meaning(self) -> dict[str, Any]:
        """Leave out the penalty."""
        options = super().meaning()
        del options["divergence"]
        return options


class QueryMemory(Shared):
    """Atoms, keys and queries of a model, and the depth summary of the current forward."""

    depends_on_all_sites = True

    def __init__(self, config: QueryableLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.options = config
        self.places = blocks_of(sites, config.block_size)
        rank, width = config.rank, config.width
        deep = is_deep(sites, config.block_size)

        def draw(name: str, *shape: int) -> nn.Parameter:
            generator = named_generator(config.seed, f"queryable-lora.{name}")
            return nn.Parameter(uniform(shape, shape[-1] ** -0.5, generator))

        generator = named_generator(config.seed, "queryable-lora")
        noise = torch.empty(config.atoms, rank, rank).normal_(0.0, 0.02, generator=generator)
        keys = torch.empty(config.atoms, width).normal_(0.0, width**-0.5, generator=generator)
        self.atoms = nn.Parameter(torch.eye(rank) + noise)
        self.keys = nn.Parameter(keys)
        self.query = draw("query", width, rank + width if deep else rank)
        self.similarity = draw("similarity", width, rank) if deep else None
        self.content = draw("content", width, rank) if deep else None
        text = len(config.instruction)
        self.prior = draw("prior", width, text) if text else None
        self._depth = Depth()

    def gates(
        self, name: str, summary: Float[Tensor, "samples rank"]
    ) -> Float[Tensor, "samples atoms"]:
        """Return the gates of the block that a layer is in.

        Args:
            name: name of the layer's site.
            summary: mean of A x over the tokens of every sample.
        """
        tower, block = self.places[name]
        if in_backward() and torch.is_grad_enabled():
            known = self._depth.recall(block, name, summary)
            if known is not None:
                return fit(known, len(summary))
        current = self._depth.enter(tower, block, name, summary)
        if block not in current.gates:
            current.states[block] = summary
            self._depth.settle(current, block, self._choose(current, block, summary))
        return fit(current.gates[block], len(summary))

    def _choose(self, current: Pass, block: int, summary: Tensor) -> Tensor:
        query = F.layer_norm(summary, summary.shape[-1:])
        if self.content is not None:
            context = self._context(summary, current.earlier(block, len(summary)))
            query = torch.cat([query, context], -1)
        query = query @ self.query.to(query.dtype).t()
        log_prior = self.log_prior(summary)
        scores = query @ self.keys.to(query.dtype).t() / self.options.width**0.5
        gates, _ = top_softmax(scores + self.options.prior_strength * log_prior, self.options.top_k)
        if self.training and self.options.divergence and torch.is_grad_enabled():
            log_gates = gates.clamp_min(torch.finfo(gates.dtype).tiny).log()  # 0 log 0 is 0
            current.divergences.append((gates * (log_gates - log_prior)).sum(-1).mean())
        return gates

    def _context(self, summary: Tensor, earlier: list[Tensor]) -> Float[Tensor, "samples width"]:
        """Return c: attention of this block's state over those of earlier blocks."""
        assert self.similarity is not None
        assert self.content is not None
        if not earlier:
            return summary.new_zeros(len(summary), self.options.width)
        states = torch.stack(earlier, 1)
        similarity = self.similarity.to(summary.dtype).t()
        query, keys = summary @ similarity, states @ similarity
        weights = (keys @ query[:, :, None] / self.options.width**0.5).softmax(1)
        return (weights * (states @ self.content.to(summary.dtype).t())).sum(1)

    def log_prior(self, like: Tensor) -> Float[Tensor, " atoms"]:
        """Return log pi in the type of a tensor."""
        if self.prior is None:
            return like.new_zeros(len(self.keys)).log_softmax(0)
        text = like.new_tensor(self.options.instruction)
        logits = self.keys.to(like.dtype) @ (self.prior.to(like.dtype) @ text)
        return (logits / self.options.temperature).log_softmax(0)

    def penalty(self) -> Tensor | None:
        """Return the weighted divergence of the blocks that have run since the last call."""
        terms = self._depth.take_divergences()
        return self.options.divergence * torch.stack(terms).mean() if terms else None

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return K r^2 + d K + d r + d |t|, and d^2 + 2 d r more with a past."""
        rank, width = config.rank, config.width
        count = config.atoms * (rank**2 + width) + width * (rank + len(config.instruction))
        return int(count + is_deep(sites, config.block_size) * (width**2 + 2 * width * rank))


class QueryableLoRA(RoutedDelta):
    """A factor pair with a routed operator in between."""

    def __init__(
        self, config: QueryableLoRAConfig, site: Site, shared: Shared | None = None
    ) -> None:
        super().__init__(config, site, shared)
        self.name, self.kind = site.name, site.kind
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, config.rank))

    @property
    def memory(self) -> QueryMemory:
        """What all layers share."""
        (memory,) = self._shared
        assert isinstance(memory, QueryMemory)
        return memory

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the pair as LoRA does."""
        reset_zero_pair(self.A, self.B, self.kind, generator)

    def update(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return the output y without bias plus `s B R A dropout(x)`."""
        down = self.A.to(x.dtype if x.is_floating_point() else y.dtype)
        dropped = layer.dropout(x, self.dropout)
        hidden = features_last(layer.down(dropped, down), layer, len(down))
        seen = hidden if dropped is x else features_last(layer.down(x, down), layer, len(down))
        with kept_for_backward(), torch.autocast(x.device.type, enabled=False):
            gates = self.memory.gates(self.name, full_precision(by_sample(seen, layer)).mean(1))
            if self.watch is not None:
                self.watch.add(gates)
            operator = self._operator(gates).to(hidden.dtype)
        mixed = (by_sample(hidden, layer) @ operator.mT).reshape(hidden.shape)
        return y + layer.up(features_back(mixed, layer), (self.scale * self.B).to(hidden.dtype))

    def _operator(self, gates: Float[Tensor, "samples atoms"]) -> Float[Tensor, "samples r r"]:
        """Return R for every sample."""
        return torch.einsum("nk,krc->nrc", gates, self.memory.atoms.to(gates.dtype))

    def frozen_factors(
        self, gates: Float[Tensor, " atoms"]
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B R, A)`."""
        (operator,) = self._operator(gates.to(self.B.dtype)[None])
        return self.B @ operator, self.A

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (out + in)."""
        return int(config.rank * (out_features + in_features))


register(QueryableLoRAConfig, QueryableLoRA, QueryMemory)
