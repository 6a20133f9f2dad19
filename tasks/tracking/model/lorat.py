"""LoRAT: one ViT over template and search tokens, frozen but for low-rank adapters.

    cat(template tokens, search tokens) -> blocks -> LayerNorm -> search part -> head

(Lin et al., "Tracking Meets LoRA", ECCV 2024, 2403.05231.) Every token attends to every other, so
matching happens inside the pretrained blocks. The backbone is any ViT in timm's form: it lends its
`patch_embed`, `pos_embed`, `blocks` and `norm`; class token and its position are left out.

Trained: token types, head, and what an adapter adds to `ADAPTED`; q, k and v have adapters of their
own. Everything else is frozen. `vl.merge` makes inference as cheap as the plain ViT.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tasks.tracking.model.drop_path import residual
from tasks.tracking.model.embedding import Embedding, PosMode, native_positions
from tasks.tracking.model.head import Head, Prediction
from tasks.tracking.model.variants import TrackerShape

__all__ = ["ADAPTED", "TRAINED", "LoRAT", "Prediction"]

ADAPTED = ("blocks.*.attn.qkv[q,k,v]", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2")
"""Targets of the adapter: every linear layer inside the blocks."""
TRAINED = ("embedding.types", "head")
"""Base parameters that train beside the adapter."""


class LoRAT(nn.Module):
    """The tracker's network; see the module docstring."""

    def __init__(
        self,
        backbone: nn.Module,
        shape: TrackerShape,
        *,
        pos_mode: PosMode = "resample",
        drop_path: float = 0.0,
    ) -> None:
        """Take a backbone's parts; the backbone itself is not kept.

        Args:
            backbone: a timm-like ViT.
            shape: sizes of the crops; its patch must be the backbone's.
            pos_mode: how positions come to the search grid, see `embedding.py`.
            drop_path: rate of stochastic depth in training, the same in every block.
        """
        super().__init__()
        parts: Any = backbone
        self.shape = shape
        self.drop_path = drop_path
        self.embedding = Embedding(parts.patch_embed, native_positions(parts), shape, pos_mode)
        self.blocks: Any = parts.blocks
        self.norm: nn.Module = parts.norm
        device = self.embedding.positions.device
        self.head = Head(self.embedding.types.shape[1], shape.search_grid).to(device)

    def forward(
        self,
        template: Float[Tensor, "batch 3 zside zside"],
        search: Float[Tensor, "batch 3 xside xside"],
        mask: Int[Tensor, "batch zgrid zgrid"],
    ) -> Prediction:
        """Return scores and boxes for the cells of the search crops.

        Args:
            template: crops around the object, normalised with ImageNet's mean and deviation.
            search: crops in which it is looked for, likewise.
            mask: 1 on cells of the template that the object touches, else 0.
        """
        return self.locate(self.remember(template, mask), search)

    def remember(
        self,
        template: Float[Tensor, "batch 3 zside zside"],
        mask: Int[Tensor, "batch zgrid zgrid"],
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the template's input tokens, which stay the same over a whole video."""
        return self.embedding.template(template, mask)

    def locate(
        self,
        remembered: Float[Tensor, "batch tokens width"],
        search: Float[Tensor, "batch 3 xside xside"],
    ) -> Prediction:
        """Return the prediction for search crops and the tokens of their templates."""
        tokens = torch.cat([remembered, self.embedding.search(search)], 1)
        rate = self.drop_path if self.training else 0.0
        for block in self.blocks:
            tokens = _run(block, tokens, rate)
        return self.head(self.norm(tokens[:, remembered.shape[1] :]))


def _run(block: Any, x: Tensor, rate: float) -> Tensor:
    """Run one pre-norm block of timm with this project's stochastic depth."""
    x = residual(x, lambda t: block.ls1(block.attn(block.norm1(t))), rate)
    return residual(x, lambda t: block.ls2(block.mlp(block.norm2(t))), rate)
