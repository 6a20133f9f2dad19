r"""Hard-concrete gates: random switches whose probability can be trained (Louizos et al. 2018).

arXiv 1712.01312, with the constants of BayesianBits (arXiv 2005.07093). For a logit phi,

    u ~ U(0, 1),  z = clamp(sigma((log u - log(1 - u) + phi) / t) (h - l) + l, 0, 1)
    P(z > 0) = sigma(phi - t log(-l / h)),      t = 2/3,  l = -0.1,  h = 1.1

While training z is drawn from the global generator, as dropout is. In evaluation z is 1 if
P(z = 0) < 0.34 and 0 otherwise; its gradient is then that of P(z > 0), so that models trained in
evaluation mode (frozen batch statistics) move their gates too.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

INITIAL = 6.0
"""Logit of a gate that is almost certainly open, but still moves."""

_TEMPERATURE, _LOW, _HIGH = 2.0 / 3.0, -0.1, 1.1
_CLOSED = 0.34
_CERTAIN = 20.0


def gate_values(phi: Float[Tensor, " n"], training: bool) -> Float[Tensor, " n"]:
    """Return the gates: drawn while training, decided otherwise."""
    if not training:
        probability = open_probability(phi)
        return is_open(phi).to(phi.dtype) + (probability - probability.detach())
    noise = torch.logit(torch.rand_like(phi), eps=1e-6)
    return (torch.sigmoid((noise + phi) / _TEMPERATURE) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def open_probability(phi: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return P(z > 0)."""
    return torch.sigmoid(phi - _TEMPERATURE * math.log(-_LOW / _HIGH))


def is_open(phi: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return which gates are open in evaluation."""
    return 1.0 - open_probability(phi) < _CLOSED


def certain(phi: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return logits of the same decisions that leave no randomness."""
    return torch.full_like(phi, _CERTAIN).where(is_open(phi), -_CERTAIN * torch.ones_like(phi))


def nested(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return products of each entry with all before it: a closed gate closes those behind it."""
    return values.cumprod(0)
