"""Conv2d of any stride, dilation, padding and grouping.

The view of the weight is `(out, in/groups * kh * kw)`. The factor path is exact and mergeable for
every grouping: with `A: r x in/groups kh kw` and `B: out x r`,

    h = conv2d(x, A repeated once per group, stride, padding, dilation, groups)
    y += s * conv1x1(h, B, groups)

which equals a convolution with `B A` in the shape of the weight. For depthwise layers forming `B
A` is cheaper, and the formula of `dense_is_cheaper` chooses that.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.hosts.base import Host, Slot, rows_of
from visionlora.hosts.changes import dense_is_cheaper, with_bias_changes, with_changes
from visionlora.hosts.linear import output_change
from visionlora.sites import Kind


class ConvLayer:
    """The operators of a convolution (see `visionlora.methods.base.Layer`)."""

    kind: Kind = "conv"
    channels: int = -3

    def __init__(self, conv: nn.Conv2d, weight: Tensor) -> None:
        self.conv = conv
        self.weight = weight

    def full(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with a weight of the layer's kernel size and any number of outputs."""
        conv = self.conv
        padding: str | tuple[int, ...] = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0, 0)
        return F.conv2d(
            x, weight, bias, conv.stride, cast(str, padding), conv.dilation, conv.groups
        )

    def down(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Thin convolution to r maps per group."""
        kernel = matrix.reshape(-1, *self.conv.weight.shape[1:])
        return self.full(x, kernel.repeat(self.conv.groups, 1, 1, 1))

    def up(self, h: Tensor, matrix: Tensor) -> Tensor:
        """1 x 1 convolution from r maps per group to the outputs."""
        return F.conv2d(h, matrix[:, :, None, None], groups=self.conv.groups)

    def per_output(self, vector: Tensor) -> Tensor:
        """Outputs are dimension 1 of a batch (0 of a single image)."""
        return vector[:, None, None]

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Plain dropout of input entries."""
        return F.dropout(x, probability, self.conv.training) if probability else x


class ConvHost(Host):
    """A Conv2d with adapters."""

    weight: Tensor
    bias: Any
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution plus the active changes."""
        conv = cast(nn.Conv2d, self)
        plain = ConvLayer(conv, self.weight.flatten(1))
        if not self.slots:
            return plain.full(x, self.weight, self.bias)
        bias = with_bias_changes(self.bias, self.slots)
        dense: list[Slot] = []
        thin: list[Slot] = []
        positions = x.numel() // (x.shape[-3] * conv.stride[0] * conv.stride[1])
        for slot in self.slots:
            factors = None if slot.delta.update is not None else slot.delta.factors()
            if factors is not None and factors[0].shape[1] == 0:  # rank 0: nothing to add
                continue
            drops = self.training and slot.delta.dropout > 0
            cheap = factors is None or (
                self.state.mode == "auto"
                and not drops
                and not slot.delta.gain_reaches_input
                and dense_is_cheaper(
                    factors, rows_of(self.weight, slot.rows), positions, conv.groups
                )
            )
            (dense if cheap and slot.delta.update is None else thin).append(slot)
        kernel = self.weight
        if dense:
            kernel = with_changes(plain.weight, dense).reshape(self.weight.shape)
        # A method that rescales the output must see it without bias and without other changes.
        rewrites = any(slot.delta.update is not None for slot in thin)
        y = plain.full(x, kernel, None if rewrites else bias)
        base = plain.full(x, self.weight) if rewrites and dense else y
        for slot in thin:
            start, stop = slot.rows or (0, conv.out_channels)
            layer = ConvLayer(conv, rows_of(plain.weight, slot.rows))
            part = output_change(base.narrow(-3, start, stop - start), x, slot, layer)
            whole = stop - start == conv.out_channels
            y = y + (part if whole else F.pad(part, (0, 0, 0, 0, start, conv.out_channels - stop)))
        if rewrites and bias is not None:
            y = y + bias[:, None, None].to(y.dtype)
        return y
