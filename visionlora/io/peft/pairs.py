"""Names and shapes of the factor pairs of PEFT's LoRA family, by kind of layer."""

from collections.abc import Mapping as Table
from typing import Any

from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.parts import AdapterParts, Entry
from visionlora.io.peft.config import exact_pattern
from visionlora.sites import Kind

ATTENTION_OUTPUT = 2.0
"""How often PEFT adds the change of the output of MultiheadAttention."""


def pair_tensors(tensors: Table[str, Tensor], prefix: str) -> tuple[Kind, Tensor, Tensor]:
    """Return the kind of layer that a pair of tensors speaks of, and the pair as matrices."""
    if f"{prefix}_embedding_A" in tensors:
        return "embedding", tensors[f"{prefix}_embedding_A"], tensors[f"{prefix}_embedding_B"]
    down, up = tensors[f"{prefix}_A"], tensors[f"{prefix}_B"]
    if down.dim() not in (2, 4) or up.shape[1] != down.shape[0]:
        raise AdapterFileError(
            f"{prefix}_A of shape {tuple(down.shape)} and {prefix}_B of shape {tuple(up.shape)} "
            "are no pair for a Linear or Conv2d layer"
        )
    return ("conv" if down.dim() == 4 else "linear"), down.flatten(1), up.flatten(1)


def kernel_entries(down: Tensor) -> int:
    """Return the entries of a kernel: those behind rank and channels."""
    return down[0, 0].numel()


def lora_tensors(
    parts: AdapterParts, entry: Entry, prefix: str, down: Tensor, up: Tensor
) -> dict[str, Tensor]:
    """Return a pair of matrices in the shapes and under the names of a layer's kind."""
    if entry.site.kind == "embedding":
        return {f"{prefix}_embedding_A": down, f"{prefix}_embedding_B": up}
    if entry.site.kind == "conv":
        down = down.reshape(-1, *kernel_shape(parts, entry))
        up = up[:, :, None, None]
    return {f"{prefix}_A": down, f"{prefix}_B": up}


def kernel_shape(parts: AdapterParts, entry: Entry) -> tuple[int, ...]:
    """Return channels, height and width of a convolution's kernel.

    Raises:
        AdapterFileError: the base weights are not known, and a file holds only their product.
    """
    weight = parts.known.tensor(f"{entry.site.module}.weight")
    if weight is None:
        raise AdapterFileError(
            f"the kernel size of {entry.site.module} is not in the file: give the state dict of "
            "the base model (--base FILE.safetensors)"
        )
    return tuple(weight.shape[1:])


def lora_config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Return the configuration of a LoRA with a rank and an alpha per layer."""
    rank, alpha = max(ranks.values()), max(alphas.values(), key=list(alphas.values()).count)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(k): v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {exact_pattern(k): v for k, v in alphas.items() if v != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
