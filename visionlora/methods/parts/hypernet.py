"""Small networks that turn embeddings of sites into features, without torch's layer classes.

Patterns such as `type:Linear` must not find layers inside an adapter, and torch's encoder layer has
a second kernel in inference that rounds differently. All weights come from a given generator, and
everything is computed in at least float32.
"""

from math import gcd

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.methods.base import uniform
from visionlora.methods.parts.routing import full_precision


class Affine(nn.Module):
    """`W x + b`, with W uniform in +-bound and b = 0."""

    def __init__(self, inputs: int, outputs: int, bound: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform((outputs, inputs), bound, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return `W x + b`."""
        return F.linear(x, full_precision(self.weight), full_precision(self.bias))


class Norm(nn.Module):
    """Layer normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, bias = full_precision(self.weight), full_precision(self.bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias)


class MLP(nn.Module):
    """`depth` hidden layers with GELU; every input is on its own."""

    def __init__(self, inputs: int, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [inputs] + [width] * (depth - 1)
        # Kaiming's gain for rectifiers keeps the size of the features through the layers.
        self.layers = nn.ModuleList(
            Affine(size, width, (6 / size) ** 0.5, generator) for size in sizes
        )

    def forward(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens width"]:
        """Return the features."""
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x

    @staticmethod
    def parameter_count(inputs: int, width: int, depth: int) -> int:
        """Return the number of weights."""
        return (inputs + 1) * width + (depth - 1) * (width + 1) * width


class Encoder(nn.Module):
    """A projection and `depth` post-norm transformer layers; all inputs attend to each other."""

    def __init__(self, inputs: int, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.project = Affine(inputs, width, inputs**-0.5, generator)
        self.layers = nn.ModuleList(EncoderLayer(width, generator) for _ in range(depth))

    def forward(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens width"]:
        """Return the features."""
        x = self.project(x)
        for layer in self.layers:
            x = layer(x)
        return x

    @staticmethod
    def parameter_count(inputs: int, width: int, depth: int) -> int:
        """Return the number of weights."""
        layer = 12 * width * (width + 1) + (8 * width + 1) * width + 4 * width
        return (inputs + 1) * width + depth * layer


class EncoderLayer(nn.Module):
    """Attention with heads of about 16 features, then a rectified layer of 8 times the width."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = width**-0.5
        self.heads = gcd(width, max(1, width // 16))
        self.qkv = Affine(width, 3 * width, bound, generator)
        self.out = Affine(width, width, bound, generator)
        self.norm1 = Norm(width)
        self.wide = Affine(width, 8 * width, bound, generator)
        self.narrow = Affine(8 * width, width, (8 * width) ** -0.5, generator)
        self.norm2 = Norm(width)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Return the next features."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = self.norm1(x + self.out((weights @ v).transpose(0, 1).flatten(1)))
        return self.norm2(x + self.narrow(F.relu(self.wide(x))))
