"""The averaged gradient of a site, as the initialisers that follow it need it."""

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.init.base import Given


def descent(given: Given, name: str) -> Float[Tensor, "out in"]:
    """Return minus the gradient of a site, its largest entry scaled to 1, in float64.

    No initialiser here depends on the size of the gradient. Without it, the squares that a
    decomposition forms stay in range whatever the loss was multiplied by.

    Args:
        given: a site with its averaged gradient.
        name: the initialiser, for messages.

    Raises:
        ConfigError: there is no gradient, or it holds NaN or infinity, or it is zero.
    """
    gradient = given.stats.gradient
    if gradient is None:
        raise ConfigError(
            f"{name}: there is no gradient for {given.where}: it is estimated from batches, with "
            f"visionlora.initialise(model, {name!r}, batches, loss_fn)"
        )
    gradient = gradient.detach().to("cpu", torch.float64)
    largest = gradient.abs().max()
    if not bool(torch.isfinite(largest)):
        raise ConfigError(f"{name}: the gradient at {given.where} holds NaN or infinity")
    if not bool(largest > 0):
        raise ConfigError(
            f"{name}: the gradient at {given.where} is zero, so it has no direction; a head whose "
            "weights are zero passes none back: give it random values, or train it alone first"
        )
    return -gradient / largest
