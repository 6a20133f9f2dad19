"""Growing the ranks of the most important sites (see the method `increlora`)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.dynamics.base import StepContext
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta
from visionlora.ranks.controller import Controller
from visionlora.ranks.importance import Importance, orthogonality
from visionlora.ranks.optimizer import add, drop, replace, warm_up
from visionlora.ranks.structure import Place
from visionlora.ranks.watch import Watched


class GrowthController(Controller):
    """Measures the importance of every site and lets the best ones grow."""

    reshapes = True

    def begin(self) -> None:
        """Plan the rounds and refuse those that do not fit."""
        config = self.config = _config(self.places[0])
        limit = sum(place.site.max_rank for place in self.places)
        self.goal = min(round(config.target * len(self.places)), limit)
        missing = self.goal - self.total
        if missing < 0:
            raise ConfigError(
                f"{self.method}: the target of {config.target:g} ranks a site is smaller than the "
                f"{self.total / len(self.places):g} that training begins with"
            )
        first = int(config.warmup * self.steps)
        rounds = math.ceil(missing / (config.add * min(config.top, len(self.places))))
        span = int(config.end * self.steps) - first
        self.interval: int = config.interval or max(1, span // max(1, rounds))
        if first + rounds * self.interval > self.steps:
            raise ConfigError(
                f"{self.method}: {rounds} rounds of growth every {self.interval} steps after "
                f"{first} do not fit into {self.steps} steps; let more sites grow at once (top, "
                "add) or train longer"
            )
        self.next = first + self.interval
        """Number of steps after which the sites grow next."""
        self.importance = Importance(config.beta, config.beta)
        self._watches = False

    @property
    def total(self) -> int:
        """Sum of the ranks of all sites, without reserves."""
        return sum(_config(place).total for place in self.places)

    @property
    def growing(self) -> bool:
        """Whether the target is still ahead."""
        return any(_config(place).reserve for place in self.places)

    def on_step_begin(self, context: StepContext) -> None:
        """Watch the sites shortly before they grow."""
        ahead = self.next - context.step
        self._watches = self.growing and ahead <= min(self.config.watch, self.interval)
        for place in self.places:
            _delta(place).watching = Watched() if self._watches else None

    def penalty(self, context: StepContext) -> Tensor | None:
        """Return the orthogonality term."""
        if self._watches and context.micro_batch == 0:  # what an earlier pass has left
            for place in self.places:
                _delta(place).watching.clear()
        if not self.config.orthogonality:
            return None
        terms = []
        for place in self.places:
            delta = _delta(place)
            terms.append(orthogonality(torch.cat(list(delta.P), 1).t()))
            terms.append(orthogonality(torch.cat(list(delta.Q))))
        return self.config.orthogonality * torch.stack(terms).mean()

    @torch.no_grad()
    def on_grads_ready(self, context: StepContext) -> None:
        """Update the importance of every watched site."""
        if not self._watches:
            return
        for place in self.places:
            delta, site = _delta(place), place.site
            up, down = delta.pair()
            found = delta.watching.sensitivity(
                delta.scale / context.loss_scale * up, down, site.groups, context.mean
            )
            size = math.sqrt(site.out_features * site.in_features)
            self.importance.add(place.name, "change", found / size)

    @torch.no_grad()
    def on_step_end(self, context: StepContext) -> None:
        """Let sites grow, if it is time and the step was not given up."""
        for place in self.places:
            _delta(place).watching = None
        if self.growing and context.step + 1 >= self.next and not context.skipped:
            self.grow(context)
            self.next = context.step + 1 + self.interval

    def grow(self, context: StepContext) -> None:
        """Give ranks to the most important sites that have room."""
        room = [place for place in self.places if _config(place).total < place.site.max_rank]
        room.sort(key=lambda place: -float(self.importance.score(place.name, "change")))
        missing = self.goal - self.total
        gains: dict[str, int] = {}
        for place in room[: self.config.top]:
            config = _config(place)
            gain = min(config.add, missing, place.site.max_rank - config.total)
            gains[place.name] = gain
            missing -= gain
        fresh: list[nn.Parameter] = []
        for place in self.places:
            gain = gains.get(place.name, 0)
            if gain or missing <= 0:
                fresh += self._renew(place, gain, last=missing <= 0)
        if fresh:
            group = add(self.optimizer, fresh, like=_delta(self.places[0]).E[0])
            warm_up(group, context.step + 1, self.interval)
        context.changed = True

    def _renew(self, place: Place, gain: int, *, last: bool) -> list[nn.Parameter]:
        """Use `gain` ranks of the reserve of a site; return what the optimiser lacks."""
        old = _delta(place)
        new: Any = place.build(old.grown(gain, last=last))
        kept = len(old.E)
        for parts in ("P", "Q", "E"):
            for index in range(kept):
                getattr(new, parts)[index] = getattr(old, parts)[index]
        fresh: list[nn.Parameter] = []
        reserve = [old.P[-1], old.Q[-1]] if old.options.reserve else []
        trained = [part for part in reserve if part.requires_grad]
        if gain:
            new.E[kept].copy_(old.values()[-old.options.add :][:gain])
            fresh.append(new.E[kept])
            for part, mine, cropped in zip(
                (new.P, new.Q), reserve, (old.P[-1][:, :gain], old.Q[-1][:gain]), strict=True
            ):
                if gain == old.options.add:
                    part[kept] = mine.requires_grad_()
                else:
                    part[kept].copy_(cropped)
                    if trained:
                        replace(self.optimizer, mine, part[kept])
                if not trained:
                    fresh.append(part[kept])
        elif trained:
            drop(self.optimizer, trained)
        if not last:
            fresh += [part for part in (new.P[-1], new.Q[-1]) if part.requires_grad]
        place.put(new)
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """Return importance and the time of the next growth."""
        return {"importance": self.importance.state_dict(), "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore importance and the time of the next growth."""
        devices = {place.name: next(place.delta.parameters()).device for place in self.places}
        self.importance.load_state_dict(state["importance"], devices)
        self.next = state["next"]


def _config(place: Place) -> Any:
    return place.delta.config


def _delta(place: Place) -> Any:
    delta: Delta = place.delta
    return delta
