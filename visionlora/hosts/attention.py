"""nn.MultiheadAttention with separate adapters on its q, k, v and output projections.

The module projects with `in_proj_weight` and `out_proj.weight` directly and never calls a child, so
wrapping a child would change nothing. This host computes the whole forward itself, for every form
of mask, layout and option, with `scaled_dot_product_attention` unless weights are asked for.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.hosts.base import Host, Slot, stored
from visionlora.hosts.linear import adapted_linear


class AttentionHost(Host):
    """A MultiheadAttention with adapters."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and attention weights as `nn.MultiheadAttention` does."""
        mha = cast(nn.MultiheadAttention, self)
        if not self.slots:
            return super().forward(  # type: ignore[misc]
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        swap = batched and not mha.batch_first
        inputs = [_batch_first(item, batched, swap) for item in _distinct(query, key, value)]
        q, k, v = self._project(*(inputs * 3 if len(inputs) == 1 else inputs))
        mask = _combine_masks(attn_mask, key_padding_mask, q, k.shape[1], mha.num_heads)
        k, v, mask = _extend(mha, k, v, mask)
        q, k, v = (item.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for item in (q, k, v))
        drop = mha.dropout if mha.training else 0.0
        weights = None
        if need_weights:
            output, weights = _explicit_attention(q, k, v, mask, drop)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        output = output.transpose(1, 2).flatten(2)
        output = adapted_linear(
            output,
            stored(mha, "out_proj.weight"),
            mha.out_proj.bias,
            self._named("out"),
            mha.training,
            self.state.mode,
        )
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output.transpose(0, 1) if swap else output), weights

    def _named(self, *keys: str) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.key in keys)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the projected q, k, v, each `(batch, length, width)`."""
        mha = cast(nn.MultiheadAttention, self)
        mode, training = self.state.mode, mha.training
        fused = mha._qkv_same_embed_dim
        if fused and query is key and key is value:
            slots = self._named("q", "k", "v")
            joint = adapted_linear(
                query, mha.in_proj_weight, mha.in_proj_bias, slots, training, mode
            )
            return list(joint.chunk(3, dim=-1))
        width = mha.embed_dim
        outputs = []
        for index, (name, source) in enumerate(zip("qkv", (query, key, value), strict=True)):
            rows = slice(index * width, (index + 1) * width)
            weight = mha.in_proj_weight[rows] if fused else getattr(mha, f"{name}_proj_weight")
            bias = None if mha.in_proj_bias is None else mha.in_proj_bias[rows]
            slots = tuple(
                Slot(slot.key, None, slot.delta, slot.strength) for slot in self._named(name)
            )
            outputs.append(adapted_linear(source, weight, bias, slots, training, mode))
        return outputs


def _distinct(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return one tensor for self-attention, so that it is projected once."""
    return [query] if query is key and key is value else [query, key, value]


def _batch_first(x: Tensor, batched: bool, swap: bool) -> Tensor:
    if not batched:
        return x.unsqueeze(0)
    return x.transpose(0, 1) if swap else x


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a boolean mask (True = blocked) as zeros and minus infinities."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _combine_masks(
    attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, length: int, heads: int
) -> Tensor | None:
    """Return one additive mask that broadcasts to `(batch, heads, queries, keys)`."""
    mask = _additive(attn_mask, q)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(q.shape[0], heads, q.shape[1], length)
    columns = _additive(padding, q)
    if columns is None:
        return mask
    columns = columns.view(-1, 1, 1, length)
    return columns if mask is None else mask + columns


def _extend(
    mha: nn.MultiheadAttention, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the learned and the zero key/value of `add_bias_kv` and `add_zero_attn`."""
    if mha.bias_k is not None and mha.bias_v is not None:
        k = torch.cat([k, mha.bias_k.expand(k.shape[0], 1, -1)], dim=1)
        v = torch.cat([v, mha.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        mask = None if mask is None else F.pad(mask, (0, 1))
    if mha.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, mask


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights
