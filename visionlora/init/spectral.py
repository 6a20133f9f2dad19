r"""PiSSA and OLoRA: the pair starts as a leading part of the weight, which is taken off again.

PiSSA (Meng et al. 2024, arXiv 2404.02948): the r largest singular triples of W = U S V^T, shared
out evenly,

    B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T;   what is left of W has norm S_{r+1}

OLoRA (Buyukakyuz 2024, arXiv 2406.01775): the first r columns and rows of W = Q R,

    B = Q_r (orthonormal),   A = R_r (upper trapezoidal),   whatever s is

Computed in float64 with fixed signs, per slice of a fused projection.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Start
from visionlora.methods.parts.decompose import leading_qr, truncated_svd
from visionlora.registry import register_initialiser

Triples = tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "r in"]]


@dataclass(frozen=True, kw_only=True)
class PiSSA(Initialiser):
    """The largest singular triples of the weight."""

    name: ClassVar[str] = "pissa"

    @property
    def residual(self) -> bool:
        """Whether the start is taken off: yes."""
        return True

    def check(self, config: AdapterConfig) -> None:
        """Refuse a scale without a root."""
        positive_scale(self.name, config)

    def triples(self, given: Given) -> Triples:
        """Return `(U, S, V^T)` of the part of the weight that the pair starts as."""
        U, S, V = truncated_svd(given.weight, given.rank, given.where)
        if not bool(S.any()):
            raise ConfigError(f"pissa: the weight of {given.where} is zero: nothing would train")
        return U, S, V

    def start(self, given: Given) -> Start:
        """Return the triples, their values shared out evenly."""
        U, S, V = self.triples(given)
        root = (S / given.scale).sqrt()
        return Start(U * root, root[:, None] * V, taken_off=True)


@dataclass(frozen=True, kw_only=True)
class OLoRA(Initialiser):
    """The first columns and rows of the weight's QR."""

    name: ClassVar[str] = "olora"

    @property
    def residual(self) -> bool:
        """Whether the start is taken off: yes."""
        return True

    def start(self, given: Given) -> Start:
        """Return the first columns of Q and rows of R."""
        Q, R = leading_qr(given.weight, given.rank, given.where)
        return Start(Q, R, taken_off=True)


def positive_scale(name: str, config: AdapterConfig) -> None:
    """Refuse an alpha that is zero or negative.

    Raises:
        ConfigError: naming the initialiser and the value.
    """
    if not getattr(config, "scale", 1.0) > 0:
        raise ConfigError(f"{name} needs a positive alpha, got {getattr(config, 'alpha', None)}")


register_initialiser(PiSSA)
register_initialiser(OLoRA)
