"""In-Squeeze: halve the rank of all sites several times during a run (see `squeeze-lora`)."""

import dataclasses
import math
from typing import Any

import torch

from visionlora.dynamics.base import StepContext
from visionlora.ranks.controller import Controller
from visionlora.ranks.factors import singular_triples
from visionlora.ranks.optimizer import group_of, replace, warm_up
from visionlora.ranks.structure import Place

_FIRST, _SPAN, _WARMUP = 0.15, 0.55, 0.01


def halvings(start: int, target: int, steps: int) -> list[tuple[int, int]]:
    """Return `(step, rank)` of every halving: the rank holds from that step on.

    Args:
        start: rank at the beginning.
        target: rank at the end.
        steps: length of the run.
    """
    count = math.ceil(math.log2(start / target))
    return [
        (int(steps * (_FIRST + _SPAN * index / count)), max(target, -(-start // 2 ** (index + 1))))
        for index in range(count)
    ]


class InSqueeze(Controller):
    """Compresses the pairs of one adapter at the steps of the schedule."""

    reshapes = True

    def begin(self) -> None:
        """Remember the rank that every site begins with."""
        self.begun = {place.name: self._rank(place) for place in self.places}

    def on_step_end(self, context: StepContext) -> None:
        """Compress every pair that the next step should find smaller."""
        for place in self.places:
            config: Any = place.delta.config
            schedule = halvings(self.begun[place.name], config.rank, self.steps)
            due = [rank for step, rank in schedule if step <= context.step + 1]
            if due and due[-1] < self._rank(place):
                self._halve(place, due[-1], context)
                context.changed = True

    @torch.no_grad()
    def _halve(self, place: Place, rank: int, context: StepContext) -> None:
        old = place.delta
        config: Any = old.config
        new = place.build(dataclasses.replace(config, start_rank=rank))
        B, A = old.get_parameter("B"), old.get_parameter("A")
        pair = singular_triples(B, A).pair(new.get_parameter("A").shape[0])
        for key, value in zip(("B", "A"), pair, strict=True):
            before, after = old.get_parameter(key), new.get_parameter(key)
            after.copy_(value)
            after.requires_grad_(before.requires_grad)
            if before.requires_grad:
                replace(self.optimizer, before, after)
                duration = max(1, round(_WARMUP * self.steps))
                # From the step that just ended, so that no step of the rise has rate 0.
                warm_up(group_of(self.optimizer, after), context.step, duration + 1)
        place.put(new)

    @staticmethod
    def _rank(place: Place) -> int:
        config: Any = place.delta.config
        return int(config.current_rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks at the beginning, on which the schedule depends."""
        return {"begun": dict(self.begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ranks at the beginning."""
        self.begun = {name: int(rank) for name, rank in state["begun"].items()}
