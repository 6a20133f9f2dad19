"""Several row slices of one layer as the one pair that PEFT has for it.

A = [A_q; A_v],   B = [[s_q B_q, 0], [0, 0], [0, s_v B_v]]
"""

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts
from visionlora.io.plain import Pair, fitting, scaled


def stacked(parts: AdapterParts, layer: str, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Return the joint pair of several row slices of a layer, scales included.

    Raises:
        AdapterFileError: the number of rows of the layer is not known.
    """
    total = _total_rows(parts, layer, pairs)
    ups = []
    for pair in pairs:
        up = scaled(pair).up
        whole = up.new_zeros(total, up.shape[1])
        start, stop = pair.site.rows or (0, up.shape[0])
        whole[start:stop] = up
        ups.append(whole)
    return fitting(torch.cat(ups, dim=1), torch.cat([pair.down for pair in pairs]))


def _total_rows(parts: AdapterParts, layer: str, pairs: list[Pair]) -> int:
    for name in ("weight", "in_proj_weight"):
        weight = parts.known.tensor(f"{layer}.{name}")
        if weight is not None:
            return weight.shape[0]
    if any(pair.site.rows is None for pair in pairs):
        return pairs[0].site.out_features
    named = {pair.site.key for pair in pairs} <= {"q", "k", "v"}
    leaf = layer.rpartition(".")[2]
    if named:
        return pairs[0].site.out_features * (2 if leaf == "kv" else 3)
    raise AdapterFileError(
        f"the number of rows of {layer} is not in the file: give the state dict of the base model "
        "(--base FILE.safetensors)"
    )
