"""Warm-in of penalties that follow the size of a site: see `bayesian-lora`."""

from typing import Any

from visionlora.dynamics.base import StepContext
from visionlora.ranks.controller import Controller

_SHARE = 0.1


class WarmIn(Controller):
    """Lets the penalty of every site rise linearly over the first 10 % of the run.

    It also tells every Delta the size of the largest factor of the adapter, to which the penalty of
    its own is relative.
    """

    def on_step_begin(self, context: StepContext) -> None:
        """Set `pressure` and `largest` of every Delta."""
        deltas: list[Any] = [place.delta for place in self.places]
        largest = max(max(delta.A.numel(), delta.B.numel()) for delta in deltas)
        for delta in deltas:
            delta.pressure = min(1.0, (context.step + 1) / (_SHARE * self.steps))
            delta.largest = largest
