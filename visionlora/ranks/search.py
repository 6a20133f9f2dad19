"""Searching for the sites that deserve a pair of their own (see the method `diffora`)."""

import dataclasses
from typing import Any

import torch
from torch import nn

from visionlora.dynamics.base import StepContext
from visionlora.methods.base import Shared
from visionlora.ranks.controller import Controller
from visionlora.ranks.optimizer import add, drop, group_of, move, replace, warm_up
from visionlora.ranks.structure import Place, build_shared_like, replace_shared

_DECAY, _BETAS = 1e-3, (0.5, 0.999)


class SearchController(Controller):
    """Alternates factors and logits, then discretises."""

    reshapes = True

    def begin(self) -> None:
        """Give the choice an optimiser group of its own."""
        self.config = _config(self.places[0])
        self.first = int(self.config.warmup * self.steps)
        self.last = int(self.config.search * self.steps)
        if self.searching and self.logits:
            (group, *_) = move(
                self.optimizer, self.logits, lr=self.config.search_lr, weight_decay=_DECAY
            )
            if "betas" in group:
                group["betas"] = _BETAS

    @property
    def matrix(self) -> Any:
        """The model-level state."""
        return self.places[0].delta.shared[0]

    @property
    def searching(self) -> bool:
        """Whether the choice is still ahead."""
        return self.matrix.chosen is None

    @property
    def logits(self) -> list[nn.Parameter]:
        """The logits of all layers."""
        return list(self.matrix.logits)

    def held_out(self, step: int) -> bool:
        """Return whether a step is one of the logits."""
        return (
            self.searching
            and bool(self.logits)
            and self.first <= step < self.last
            and (step - self.first) % 2 == 1
        )

    def on_grads_ready(self, context: StepContext) -> None:
        """Keep the gradients of what this step is for."""
        if not self.searching:
            return
        logits = {id(item) for item in self.logits}
        wanted = self.held_out(context.step)
        for parameter in context.parameters:
            if (id(parameter) in logits) is not wanted:
                parameter.grad = None

    def on_step_end(self, context: StepContext) -> None:
        """Choose when the search is over."""
        if self.searching and context.step + 1 >= self.last:
            self.choose(context)

    def choice(self) -> str:
        """Return `1` or `0` for every site."""
        digits = ["1"] * len(self.places)
        for layer, logits in zip(self.matrix.layers, self.logits, strict=True):
            values = logits.tolist()
            best = sorted(zip([-value for value in values], layer, strict=True))
            for _, index in best[max(1, int(self.config.keep * len(layer) + 0.5)) :]:
                digits[index] = "0"
        order = [self.matrix.index[place.site.name] for place in self.places]
        return "".join(digits[index] for index in order)

    @torch.no_grad()
    def choose(self, context: StepContext) -> None:
        """Give chosen sites new pairs of their own, and the others what they share."""
        chosen, old = self.choice(), self.matrix
        gone = list(self.logits)
        kept: list[Place] = []
        for place, digit in zip(self.places, chosen, strict=True):
            if digit == "0":
                gone += list(place.delta.parameters())
            if digit == "1" or self.config.sharing == "share":
                kept.append(place)
            else:
                place.remove()
        if len(kept) < len(self.places):
            chosen = "1" * len(kept)
        self.places = kept
        self.config = dataclasses.replace(self.config, chosen=chosen)
        shared = build_shared_like([(place, self.config) for place in kept])
        assert isinstance(shared, Shared)
        drop(self.optimizer, gone)
        groups = []
        for place, digit in zip(kept, chosen, strict=True):
            before, after = place.delta, place.build(self.config, shared)
            if digit == "1":
                for name, parameter in after.named_parameters():
                    replace(self.optimizer, before.get_parameter(name), parameter)
                    groups.append(group_of(self.optimizer, parameter))
            place.put(after)
        replace_shared(self.model, old, shared)
        pairs = list(shared.parameters())
        if pairs:
            own = kept[chosen.index("1")].delta.get_parameter("A")
            groups.append(add(self.optimizer, pairs, like=own))
        for group in groups:
            warm_up(group, context.step + 1, max(1, self.first))
        context.changed = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the places that the resumed run has."""
        self.places = self.find()


def _config(place: Place) -> Any:
    return place.delta.config
