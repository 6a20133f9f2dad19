r"""VB-LoRA: factors put together from a shared bank of vectors (Li et al. 2024, arXiv 2405.15179).

    Delta W = B A,   every b-long piece of a row of A or a column of B is
    sum_{i in top-k} softmax(top-k of its h logits)_i * bank_i

    bank: h x b trained, shared by all sites;   logits_A: r x in/b x h, logits_B: out/b x r x h

b must divide in and out. Initial values: bank uniform in +-0.02, logits normal with deviation 0.1,
so the change is small but not zero.

Trained: r (in + out) h / b logits a site, and h b in all for the bank. The paper trains logits ten
times as fast as the bank, and that is what they ask of the optimiser. Only the k chosen logits of a
piece get a gradient. Files hold bank and logits, so that training can go on (k indices and k - 1
weights a piece would be enough to apply the adapter). Merge: W + B A.

Defaults as in PEFT: r = 4, h = b = 256, k = 2. 256 divides the widths of ViT-B and ViT-L; ViT-S and
ViT-Ti need b = 128 or 64, convolutions a divisor of both sides of their views.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Group, Shared, uniform
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Options of VB-LoRA."""

    method: ClassVar[str] = "vb-lora"

    rank: int = 4
    """Inner dimension r of the factor pair."""
    bank: int = 256
    """Number h of vectors in the bank."""
    block: int = 256
    """Length b of a vector; divides both sides of every site."""
    top_k: int = 2
    """Number k of vectors mixed into a piece."""
    dropout: float = 0.0
    """Dropout of the branch input while training."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("rank", "bank", "block", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"vb-lora: {name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.bank:
            raise ConfigError(
                f"vb-lora: top_k must be at most the bank's {self.bank} vectors, got {self.top_k}"
            )

    def check_site(self, site: Site) -> None:
        """Refuse a site that cannot be cut into blocks or cannot have the rank."""
        out, width = site.out_features, site.in_features
        name = site.name or "the layer"
        if out % self.block or width % self.block:
            raise ConfigError(
                f"vb-lora: block {self.block} does not divide both sides of {name}, whose view is "
                f"{out} x {width}; divisors of {math.gcd(out, width)} do"
            )
        if self.rank > site.max_rank:
            raise ConfigError(
                f"vb-lora: rank {self.rank} is larger than {name} allows: its view is "
                f"{out} x {width}, so at most {site.max_rank}"
            )


class VectorBank(Shared):
    """The shared vectors."""

    def __init__(self, config: VBLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        generator = named_generator(config.seed, "vb-lora")
        self.bank = nn.Parameter(uniform((config.bank, config.block), 0.02, generator))

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return h b."""
        return int(config.bank * config.block)


class VBLoRA(Delta):
    """The logits of one site's pieces."""

    zero_at_init = False
    groups: ClassVar = {"logits_A": Group(lr=10.0), "logits_B": Group(lr=10.0)}

    def __init__(self, config: VBLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        rank, bank = config.rank, config.bank
        self.logits_A = nn.Parameter(torch.empty(rank, site.in_features // config.block, bank))
        self.logits_B = nn.Parameter(torch.empty(site.out_features // config.block, rank, bank))

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw both sets of logits."""
        for logits in (self.logits_A, self.logits_B):
            logits.copy_(torch.empty(logits.shape).normal_(0.0, 0.1, generator=generator))

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return `(B, A)`."""
        B = self._mix(self.logits_B).transpose(1, 2).flatten(0, 1)
        return B, self._mix(self.logits_A).flatten(1)

    def _mix(
        self, logits: Float[Tensor, "first second bank"]
    ) -> Float[Tensor, "first second block"]:
        """Return the mixture of bank vectors of every piece."""
        vectors = self._shared[0]
        assert isinstance(vectors, VectorBank)
        best, which = logits.topk(self.options.top_k, dim=-1)
        return (best.softmax(-1)[..., None, :] @ vectors.bank[which]).squeeze(-2)

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return r (in + out) h / b."""
        pieces = (out_features + in_features) // config.block
        return int(config.rank * pieces * config.bank)


register(VBLoRAConfig, VBLoRA, VectorBank)
