"""Chains of Linears with one adapter, for tests of single methods."""

import torch
from torch import nn

import visionlora as vl


def chain(*shapes, seed=0):
    """Return float64 Linears of `(in, out)`, one after the other."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).double()


def adapted_chain(method, *shapes, targets="type:Linear", **options):
    """Return an adapted chain with fresh trainables."""
    return vl.inject(chain(*shapes), method, targets=targets, **options)


@torch.no_grad()
def disturb(model, size=1.0):
    """Move every trainable and return the model."""
    generator = torch.Generator().manual_seed(11)
    for _, item in vl.trainable_parameters(model):
        item.add_(size * torch.randn(item.shape, generator=generator, dtype=torch.float64))
    return model


def delta_of(layer, key="weight"):
    """Return the Delta of an adapted layer."""
    return layer.adapters["default"][key]


def change_of(layer):
    """Return the change of an adapted Linear's weight."""
    return delta_of(layer).delta(layer.weight).detach()


def full_gradient(layer, x, goal):
    """Return the gradient of `<goal, layer(x)>` by the whole weight of a Linear."""
    return goal.t() @ x


def trained_names(model):
    """Return the last part of the name of every trainable, without repetition."""
    return {name.rsplit(".", 1)[-1] for name, _ in vl.trainable_parameters(model)}
