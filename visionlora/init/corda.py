r"""CorDA: the pair starts as what the inputs use of W (Yang et al. 2024, arXiv 2406.05223).

    C = mean of x x^T / its mean diagonal + damping * I,   W C = U S V^T,   W = U S (V^T C^-1)
    B0 = U_j sqrt(S_j / s),   A0 = sqrt(S_j / s) V_j^T C^-1
    Delta W = s (B A - B0 A0),   exactly zero at first

`ipm` (default): j are the r largest singular values, the part that the inputs use most, to learn
what the batches show. `kpm`: the r smallest, the part that they use least, to keep what W knows
about them; C is then taken from inputs of the knowledge to be kept. With white inputs C = (1 +
damping) I, and `ipm` is PiSSA.

Damping doubles until `|C C^-1 - I| < 0.05` in Frobenius norm, as in the reference.

Derived: C is divided by its mean diagonal, so that the sizes of A and B do not depend on that of
the inputs; the product of both never does. The reference divides every batch by its largest entry
instead, which makes batches with an outlier count less; with one batch the products are equal.

Some 256 samples suffice. Cost: one SVD and one inverse of in x in a site, in float64.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Need, Start
from visionlora.init.spectral import positive_scale
from visionlora.methods.parts.decompose import smallest_svd, truncated_svd
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class CorDA(Initialiser):
    """Singular triples of the weight behind the covariance of its inputs."""

    name: ClassVar[str] = "corda"
    needs: ClassVar[frozenset[Need]] = frozenset({"covariance"})

    mode: Literal["ipm", "kpm"] = "ipm"
    """`ipm`: the part of the weight that the inputs use most. `kpm`: the one they use least."""
    damping: float = 0.01
    """What is added to the diagonal, relative to its mean."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.damping > 0:
            raise ConfigError(f"corda: damping must be positive, got {self.damping}")

    @property
    def residual(self) -> bool:
        """Whether the start is taken off: yes."""
        return True

    def check(self, config: AdapterConfig) -> None:
        """Refuse a scale without a root."""
        positive_scale(self.name, config)

    def start(self, given: Given) -> Start:
        """Return the triples, their values shared out evenly."""
        C, inverse = damped(_covariance(given), self.damping)
        decompose = truncated_svd if self.mode == "ipm" else smallest_svd
        U, S, V = decompose(given.weight @ C, given.rank, given.where)
        noise = max(given.weight.shape) * torch.finfo(S.dtype).eps * given.weight.norm() * C.norm()
        if not bool(S.max() > noise):
            raise ConfigError(
                f"corda: the weight of {given.where} has no part of rank {given.rank} in mode "
                f"{self.mode}: nothing would train; lower the rank, use mode 'ipm' or exclude it"
            )
        root = (S / given.scale).sqrt()
        return Start(U * root, root[:, None] * (V @ inverse), taken_off=True)


def damped(
    covariance: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """Return a covariance of mean diagonal 1 that is far enough from singular, and its inverse.

    Args:
        covariance: of mean diagonal 1.
        damping: first value that is added to its diagonal, doubled until the inverse is good.
    """
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    while True:
        C = covariance + damping * identity
        inverse, failed = torch.linalg.inv_ex(C)
        if not int(failed) and float((C @ inverse - identity).norm()) < 0.05:
            return C, inverse
        damping *= 2


def _covariance(given: Given) -> Float[Tensor, "in in"]:
    """Return the covariance of the inputs over its mean diagonal, in float64."""
    covariance = given.stats.covariance
    if covariance is None:
        raise ConfigError(
            f"corda: there is no covariance for {given.where}: it is estimated from batches, use "
            "visionlora.initialise(model, 'corda', batches, loss_fn)"
        )
    covariance = covariance.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(covariance).all()):
        raise ConfigError(f"corda: the covariance of {given.where} holds NaN or infinity")
    size = float(covariance.diagonal().mean())
    if not size > 0:
        raise ConfigError(f"corda: all inputs of {given.where} are zero, so they prefer nothing")
    return covariance / size


register_initialiser(CorDA)
register_preset("corda", "lora", "LoRA that starts as what the inputs need of the weight", "corda")
