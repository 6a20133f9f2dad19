"""Dense mode: the layer's `weight` reads as the changed weight, for every reader.

Some models never call a layer but read its weight (`F.linear(x, self.qkv.weight, bias)` in timm's
BEiT, EVA and Swin V2, CLIP's attention pooling), and some layers have a forward of their own
(weight-standardised or same-padded convolutions) or no matrix (norms). Here `weight` is a property
of the swapped class that returns `W + changes`, and `bias` likewise, so the layer's own forward and
any other reader see the same tensors. The stored parameters keep their names and their place in the
state dict. It costs a dense change and its gradient in every step, and cannot drop inputs.
"""

from typing import cast

from torch import Tensor, nn

from visionlora.hosts.base import Host, stored
from visionlora.hosts.changes import padded, with_bias_changes


class DenseHost(Host):
    """A layer whose `weight` attribute includes the active changes; its forward is its own."""

    @property
    def weight(self) -> Tensor:
        """The stored weight plus the active changes."""
        weight = stored(self, "weight")
        if not self.slots:
            return weight
        transposed = self.site(self.slots[0].key).kind == "embedding"
        flat = weight.t() if transposed else weight.reshape(len(weight), -1)
        for slot in self.slots:
            change = self.change(slot).to(weight.dtype)
            flat = flat + padded(change.t(), slot.rows, flat.shape[0]).t()
        return flat.t() if transposed else flat.reshape(weight.shape)

    @property
    def bias(self) -> Tensor | None:
        """The stored bias plus the active changes."""
        parameters = cast(nn.Module, self)._parameters
        if "bias" not in parameters:
            raise AttributeError(f"{self.plain_class.__name__} has no bias")
        return with_bias_changes(parameters["bias"], self.slots)
