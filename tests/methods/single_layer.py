"""One adapted layer, for tests of what a method says of itself."""

import copy

import torch
from torch import Tensor, nn

import visionlora as vl
from visionlora.methods.base import Delta


def adapt(layer: nn.Module, method: str, *, random: bool = True, **options: object) -> nn.Module:
    """Return a model with `layer` as its only, adapted layer `0`; trainables random if asked."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(copy.deepcopy(layer)).double()
    with torch.no_grad():
        for item in model.parameters():
            item.copy_(torch.randn(item.shape, generator=generator))
        vl.inject(model, method, targets="0", **options)
        if random:
            for _, item in vl.trainable_parameters(model):
                item.add_(0.5 * torch.randn(item.shape, generator=generator))
    return model


def delta_of(model: nn.Module) -> Delta:
    """Return the only Delta of the model."""
    return model[0].adapters["default"]["weight"]


def view(model: nn.Module) -> Tensor:
    """Return the frozen weight as the `(out, in)` view."""
    return model[0].view("weight").detach()


def change(model: nn.Module) -> Tensor:
    """Return the dense change of the layer."""
    return delta_of(model).delta(view(model)).detach()


def rank(matrix: Tensor) -> int:
    """Return the numerical rank."""
    return int(torch.linalg.matrix_rank(matrix))


def inputs(*shape: int) -> Tensor:
    """Return a fixed random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
