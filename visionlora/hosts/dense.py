"""Dense mode: the layer's `weight` reads as the changed weight, for every reader.

Some models never call a layer but read its weight (`F.linear(x, self.qkv.weight, bias)` in timm's
BEiT, EVA and Swin V2, CLIP's attention pooling), and some layers have a forward of their own
(weight-standardised or same-padded convolutions). Here `weight` is a property of the swapped class
that returns `W + changes`, so the layer's own forward and any other reader see the same matrix. The
stored parameter keeps its name and its place in the state dict. It costs a dense change and its
gradient in every step, and cannot drop inputs.
"""

from torch import Tensor

from visionlora.hosts.base import Host, stored
from visionlora.hosts.linear import padded


class DenseHost(Host):
    """A layer whose `weight` attribute includes the active changes; its forward is its own."""

    @property
    def weight(self) -> Tensor:
        """The stored weight plus the active changes."""
        weight = stored(self, "weight")
        if not self.slots:
            return weight
        transposed = self.site(self.slots[0].key).kind == "embedding"
        flat = weight.t() if transposed else weight.flatten(1)
        for slot in self.slots:
            change = self.change(slot).to(weight.dtype)
            flat = flat + padded(change.t(), slot.rows, flat.shape[0]).t()
        return flat.t() if transposed else flat.reshape(weight.shape)
