r"""AdamW directions `u = M^ / (sqrt(V^) + eps)` of gradients that no optimiser sees.

    M = b1 M + (1 - b1) E,   V = b2 V + (1 - b2) E^2,   M^ = M / (1 - b1^t),   V^ = V / (1 - b2^t)

A gradient of low rank, `E = left @ right`, is never formed as a whole, and neither is u, of which
only `u A^T` and `B^T u` are wanted: on a CPU the weight is walked through in blocks of rows that
stay in its cache. Moments have the dtype of the gradients and are kept by name, so that they can be
saved.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

_BLOCK = 1 << 18
"""Entries that are worked on at once on a CPU."""


class Moments:
    """First and second moments by name, each with its own number of steps.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.steps: dict[str, int] = {}
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def through_pair(
        self,
        name: str,
        left: Float[Tensor, "m k"],
        right: Float[Tensor, "k n"],
        up: Float[Tensor, "m r"],
        down: Float[Tensor, "r n"],
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """Take `left @ right` in, and return `(u down^T, up^T u)`."""
        rows, columns = left.shape[0], right.shape[1]
        first, second, before = self._next(name, left.new_zeros, (rows, columns))
        block = max(1, _BLOCK // columns) if left.device.type == "cpu" else rows
        into_up, into_down = torch.empty_like(up), torch.zeros_like(down)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            u = self._direction(left[part] @ right, first[part], second[part], before)
            into_up[part] = (down @ u.t()).t()
            into_down.addmm_(up[part].t(), u)
        return into_up, into_down

    def of(self, name: str, gradient: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Take a gradient in, and return its direction."""
        first, second, before = self._next(name, gradient.new_zeros, tuple(gradient.shape))
        return self._direction(gradient.contiguous(), first, second, before)

    def _next(
        self, name: str, zeros: Callable[..., Tensor], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, int]:
        """Return the moments, zero at first, and how many steps they have seen."""
        if name not in self.steps:
            self.first[name], self.second[name] = zeros(shape), zeros(shape)
        before = self.steps.get(name, 0)
        self.steps[name] = before + 1
        return self.first[name], self.second[name], before

    def _direction(self, gradient: Tensor, first: Tensor, second: Tensor, before: int) -> Tensor:
        """Update moments in place and return u, in one pass over memory."""
        # A parameter of zeros that takes a step of length minus one.
        direction = torch.zeros_like(gradient)
        adamw(
            [direction],
            [gradient],
            [first],
            [second],
            [],
            [torch.full((), before, dtype=torch.float32, device=gradient.device)],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=-1.0,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
        return direction

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and moments by name."""
        return {"steps": dict(self.steps), "first": dict(self.first), "second": dict(self.second)}

    def load_state_dict(self, state: dict[str, Any], device: Callable[[str], torch.device]) -> None:
        """Restore what `state_dict` returned, each on the device that is given for its name."""
        self.steps = dict(state["steps"])
        for key in ("first", "second"):
            own = {name: value.to(device(name)).clone() for name, value in state[key].items()}
            setattr(self, key, own)
