"""How important a parameter or a site is: smoothed sensitivity times its uncertainty.

    I' <- beta1 I' + (1 - beta1) I,   U' <- beta2 U' + (1 - beta2) |I - I'|,   score = I' U'

AdaLoRA takes I = |w dL/dw| of every entry, IncreLoRA its mean over a whole change.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Importance:
    """Smoothed sensitivity and uncertainty of tensors, by owner and name."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self._smooth: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def update(self, owner: str, parameters: Mapping[str, Tensor]) -> None:
        """Add the sensitivity of parameters whose gradients are there."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.add(owner, name, (parameter * parameter.grad).abs())

    def add(self, owner: str, name: str, sensitivity: Tensor) -> None:
        """Add a sensitivity."""
        zero = torch.zeros_like(sensitivity)
        mean, spread = self._smooth.setdefault(owner, {}).get(name, (zero, zero))
        mean = self.beta1 * mean + (1 - self.beta1) * sensitivity
        spread = self.beta2 * spread + (1 - self.beta2) * (sensitivity - mean).abs()
        self._smooth[owner][name] = (mean, spread)

    @property
    def measured(self) -> bool:
        """Whether any sensitivity was added."""
        return bool(self._smooth)

    def score(self, owner: str, name: str) -> Tensor:
        """Return `I' U'`."""
        mean, spread = self._smooth[owner][name]
        return mean * spread

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {owner: dict(found) for owner, found in self._smooth.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], devices: Mapping[str, torch.device]
    ) -> None:
        """Restore everything, on the device of each owner."""
        self._smooth = {
            owner: {
                name: (mean.to(devices[owner]), spread.to(devices[owner]))
                for name, (mean, spread) in found.items()
            }
            for owner, found in state.items()
        }


def orthogonality(rows: Float[Tensor, "rank features"]) -> Float[Tensor, ""]:
    """Return the Frobenius norm of `R R^T - I`."""
    gram = rows @ rows.t()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(gram - identity)
