r"""Initial pairs that are a part of the weight, which is taken off again: PiSSA and OLoRA.

Both start from a pair with `s * B0 A0` = a part of W of rank r, and train what replaces it. The
change is what has been added since, so W itself is never touched:

    Delta W = s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]

PiSSA (Meng et al. 2024, arXiv 2404.02948): the r largest singular triples of W = U S V^T, shared
out evenly: `B0 = U_r sqrt(S_r / s)`, `A0 = sqrt(S_r / s) V_r^T`. What is left has norm S_{r+1}.

OLoRA (Buyukakyuz 2024, arXiv 2406.01775): the first r columns and rows of W = Q R: `B0 = Q_r`
(orthonormal), `A0 = R_r` (upper trapezoidal), without regard to s.

Written with differences (derived), the change is exactly zero at first and as exact as training's
own steps in any precision; as a difference of two products, bfloat16 would leave noise of the size
of B0 A0 in the output.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.methods.parts.decompose import leading_qr, truncated_svd

Pair = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]


def initial_pair(
    init: str, weight: Float[Tensor, "out in"], rank: int, scale: float, where: str
) -> Pair:
    """Return `(B0, A0)` of `init`, in float64 on the CPU.

    Args:
        init: `pissa` or `olora`.
        weight: the frozen weight.
        rank: inner dimension of the pair.
        scale: the factor s in front of the product, positive.
        where: name of the layer for messages.

    Raises:
        ConfigError: the weight holds NaN or infinity, or is zero and PiSSA could not train it.
    """
    if init == "olora":
        return leading_qr(weight, rank, where)
    U, S, V = truncated_svd(weight, rank, where)
    if not bool(S.any()):
        raise ConfigError(f"init='pissa': the weight of {where} is zero, so nothing would train")
    root = (S / scale).sqrt()
    return U * root, root[:, None] * V


def difference(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor) -> Pair:
    """Return `(up, down)` with `up @ down = B A - B0 A0`, without cancellation."""
    return torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0])
