r"""MiLoRA: the pair starts as the smallest singular triples (Wang et al. 2024, arXiv 2406.09044).

    W = U S V^T,   B0 = U_m sqrt(S_m / s),   A0 = sqrt(S_m / s) V_m^T,   m: the r smallest
    Delta W = s (B A - B0 A0),   exactly zero at first

The mirror image of PiSSA: `s B0 A0` is the part of W of rank r with the least energy. What stays
frozen is W's best approximation of rank min(out, in) - r, which training then disturbs least.

A weight of lower rank may have nothing there: both factors would be zero and nothing would train,
which is refused. Cost: one full SVD a site, in float64, per slice of a fused projection.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from visionlora.errors import ConfigError
from visionlora.init.base import Given
from visionlora.init.spectral import PiSSA, Triples
from visionlora.methods.parts.decompose import smallest_svd
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class MiLoRA(PiSSA):
    """The smallest singular triples of the weight."""

    name: ClassVar[str] = "milora"

    def triples(self, given: Given) -> Triples:
        """Return the smallest triples."""
        U, S, V = smallest_svd(given.weight, given.rank, given.where)
        noise = max(given.weight.shape) * torch.finfo(S.dtype).eps * given.weight.norm()
        if not bool(S.max() > noise):
            raise ConfigError(
                f"milora: the weight of {given.where} has no part in its {given.rank} smallest "
                "singular triples: nothing would train; pissa starts from the largest"
            )
        return U, S, V


register_initialiser(MiLoRA)
register_preset("milora", "lora", "LoRA that starts as the smallest singular triples", "milora")
