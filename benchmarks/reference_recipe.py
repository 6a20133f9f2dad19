"""CLIP-LoRA's recipe with the costs of its public code (Zanella 2024, arXiv 2405.18541).

Written anew from what that code does, as the other side of `fewshot_speed.py`:

    dropout > 0:  y = x W^T + b + s dropout(x) (B A)^T        s = alpha / sqrt(r)
    dropout = 0:  y = x (W + s B A)^T + b

- The change `B A` is formed as a dense matrix in every forward of every q, k and v, which have a
  dropout of their own each, and multiplied with all tokens.
- Prompts are tokenised in every step, and the text tower sees the whole context of 77 tokens.
- `eval()` adds the change to the weights in place and `train()` subtracts it, so the evaluation is
  merged, and weights drift by rounding.

What that code does on top and this does not (it would only add to the cost): it moves every
sequence between two layouts, and keeps a second full copy of each weight while it builds a layer.
Without dropout the mathematics is that of our `lora`, which a test compares.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_SCALE = 100.0


class ReferenceLinear(nn.Module):
    """A frozen linear map with a trained change `s B A` that is formed densely."""

    def __init__(self, weight: Tensor, bias: Tensor, rank: int, alpha: float, dropout: float):
        super().__init__()
        out_features, in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / math.sqrt(rank)
        self.dropout = dropout
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of `(..., in)` to `(..., out)`."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        change = self.B @ self.A
        if not self.dropout:
            return F.linear(x, self.weight + self.scale * change, self.bias)
        y = F.linear(x, self.weight, self.bias)
        z = F.dropout(x, self.dropout, self.training)
        return y + torch.matmul(z, change.t()) * self.scale

    @torch.no_grad()
    def train(self, mode: bool = True) -> "ReferenceLinear":
        """Merge on the way to evaluation and subtract on the way back."""
        super().train(mode)
        if self.merged == mode:
            self.weight.add_(self.B @ self.A, alpha=-self.scale if mode else self.scale)
            self.merged = not mode
        return self


class ReferenceAttention(nn.Module):
    """Self-attention whose separate q, k and v carry changes, in the place of torch's module."""

    def __init__(self, mha: nn.MultiheadAttention, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.heads = mha.num_heads
        weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (
            ReferenceLinear(weight, bias, rank, alpha, dropout)
            for weight, bias in zip(weights, biases, strict=True)
        )
        self.out = mha.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return the output of `(batch, tokens, width)`, and no weights."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(y.transpose(1, 2).flatten(2)), None


def adapt_reference(clip: Any, rank: int, alpha: float, dropout: float) -> None:
    """Freeze an open_clip model and replace the attention of both towers, in place."""
    clip.requires_grad_(False)
    for tower in (clip.visual.transformer, clip.transformer):
        for block in tower.resblocks:
            block.attn = ReferenceAttention(block.attn, rank, alpha, dropout)


class ReferenceRecipe:
    """Steps and evaluation as the reference carries them out.

    Args:
        clip: a model that `adapt_reference` has changed.
        tokenizer: makes tokens of the full context from texts.
        classes: names of the classes.
        template: the prompt, with `{}` for the name.
        steps: length of the cosine schedule.
    """

    def __init__(
        self,
        clip: Any,
        tokenizer: Callable[[list[str]], Tensor],
        classes: Sequence[str],
        template: str,
        steps: int,
    ) -> None:
        self.clip, self.tokenizer = clip, tokenizer
        self.classes, self.template = classes, template
        trained = [p for p in clip.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps, 1e-6)

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the scores of normalised pictures."""
        texts = self.tokenizer([self.template.format(name) for name in self.classes])
        text = F.normalize(self.clip.encode_text(texts), dim=-1)
        image = F.normalize(self.clip.encode_image(pixels), dim=-1)
        return LOGIT_SCALE * image @ text.t()

    def step(self, pixels: Tensor, labels: Tensor) -> float:
        """Carry out one optimisation step and return its loss."""
        loss = F.cross_entropy(self.logits(pixels), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, pixels: Tensor) -> Tensor:
        """Score pictures in evaluation mode, and go back to training."""
        self.clip.eval()
        logits = self.logits(pixels)
        self.clip.train()
        return logits
