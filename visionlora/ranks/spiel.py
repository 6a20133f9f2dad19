"""When and where the entries of SpIEL move, and how they are trained (see the method `spiel`).

```
step % every < observe         gradients of the adapted weights are looked at   (gradient only)
step % every = observe - 1     entries move, after the step; not after the last one of the run
```

A skipped step is not counted: what it showed is forgotten, and a selection waits for the next step
that is applied. Several processes average what they see before they choose, so all choose alike.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from visionlora.dynamics.base import StepContext
from visionlora.methods.parts.sparse import adam_step, regrow, sm3_step
from visionlora.ranks.controller import Controller

if TYPE_CHECKING:
    from visionlora.methods.spiel import SpIEL, SpIELConfig

State = dict[str, Tensor]


@dataclass
class Seen:
    """What a window of steps has shown of the gradient of one weight."""

    candidates: Tensor | None = None
    """Flat positions, once they are chosen."""
    total: Tensor | None = None
    """Sum over steps of the gradient there."""
    squares: Tensor | None = None
    """Sum over steps of its square."""
    steps: int = 0
    now: Tensor | None = field(default=None, repr=False)
    """Sum over the micro-batches of this step."""
    dense: Tensor | None = field(default=None, repr=False)
    """Sum over the micro-batches of this step, as long as there are no candidates."""

    def forget_step(self) -> None:
        """Undo what this step has shown."""
        self.now = self.dense = None
        if not self.steps:
            self.candidates = None

    def end_step(self, average: Any) -> None:
        """Count what this step has shown."""
        if self.now is None:
            return
        now = average(self.now)
        self.total = now if self.total is None else self.total + now
        self.squares = now.square() if self.squares is None else self.squares + now.square()
        self.steps += 1
        self.now = None


class SpIELController(Controller):
    """Trains the values, and moves entries to where they are needed."""

    def begin(self) -> None:
        """Start without moments."""
        self.config = cast("SpIELConfig", self.places[0].delta.config)
        self.selections = 0
        """Selections so far."""
        self.open = False
        """Whether a selection is ahead in this period."""
        self.seen: dict[str, Seen] = {}
        self.moments: dict[str, State] = {}
        if self.config.selection != "fixed":
            self.moments = {name: self._fresh(delta) for name, delta in self.deltas.items()}
        self._gradients: dict[str, Tensor] = {}

    @property
    def deltas(self) -> "dict[str, SpIEL]":
        """The Deltas by name of their place."""
        return {place.name: cast("SpIEL", place.delta) for place in self.places}

    def _fresh(self, delta: "SpIEL") -> State:
        """Return the optimiser's state of a site before the first step."""
        shapes = {"mean": delta.values.shape, "square": delta.values.shape}
        shapes["age"] = delta.values.shape
        if self.config.selection == "sm3":
            shapes = {"row": torch.Size(delta.shape[:1]), "column": torch.Size(delta.shape[1:])}
        kind = torch.promote_types(delta.values.dtype, torch.float32)
        make = partial(torch.zeros, dtype=kind, device=delta.values.device)
        return {name: make(shape) for name, shape in shapes.items()}

    # -- looking

    def on_step_begin(self, context: StepContext) -> None:
        """Open a period, and look at gradients where it is time."""
        if self.config.selection == "fixed":
            return
        if context.step % self.config.every == 0:
            self.open = self._last_moment(context.step) < self.steps - 1
            self.seen = {}
        if self.open and self.config.selection == "gradient":
            for name, delta in self.deltas.items():
                self.seen.setdefault(name, Seen())
                delta.observer = partial(self._see, context, name)

    def _last_moment(self, step: int) -> int:
        return step - step % self.config.every + self.config.observe - 1

    def penalty(self, context: StepContext) -> None:
        """Add nothing; a second pass over the micro-batches starts the step anew."""
        if context.micro_batch == 0:
            for item in self.seen.values():
                item.forget_step()

    @torch.no_grad()
    def _see(self, context: StepContext, name: str, gradient: Tensor) -> None:
        """Look at the gradient of one weight, in the backward of one micro-batch.

        Of a layer that is called several times in a forward, the call that is differentiated
        first chooses the candidates, and all of them count.
        """
        seen = self.seen[name]
        flat = gradient.flatten().to(self.moments[name]["mean"].dtype)
        if seen.candidates is not None:
            found = flat.index_select(0, seen.candidates)
            seen.now = found if seen.now is None else seen.now + found
            return
        flat = flat if seen.dense is None else seen.dense + flat
        more = context.micro_batch + 1 < context.micro_batches
        if more and self.config.candidates == "step":
            seen.dense = flat
            return
        flat = context.mean(flat)
        count = len(self.moments[name]["mean"])
        seen.candidates = flat.abs().topk(count, sorted=False).indices.int()
        seen.now, seen.dense = flat.index_select(0, seen.candidates), None

    def on_grads_ready(self, context: StepContext) -> None:
        """Count the gradients of this step, averaged over processes and as if unscaled."""
        for item in self.seen.values():
            item.end_step(lambda value: context.mean(value) / context.loss_scale)

    # -- training

    def on_grads_clipped(self, context: StepContext) -> None:
        """Take the gradients of the values, so that the optimiser leaves them alone."""
        if self.config.selection == "fixed":
            return
        for name, delta in self.deltas.items():
            if delta.values.grad is not None:
                self._gradients[name] = delta.values.grad
                delta.values.grad = None

    def on_step_end(self, context: StepContext) -> None:
        """Train the values and, if it is time, move entries."""
        self._look_away()
        gradients, self._gradients = self._gradients, {}
        if context.skipped:
            for item in self.seen.values():
                item.forget_step()
            return
        groups = {
            id(item): group for group in self.optimizer.param_groups for item in group["params"]
        }
        deltas = self.deltas
        for name, gradient in gradients.items():
            self._train(deltas[name], self.moments[name], gradient, groups[id(deltas[name].values)])
        if self.open and context.step >= self._last_moment(context.step):
            share = self.share(context.step + 1)
            for name, delta in deltas.items():
                group = groups[id(delta.values)]
                self._select(name, delta, share, group.get("betas", (0.9, 0.999)))
            self.selections += 1
            self.open, self.seen = False, {}

    def on_step_failed(self, context: StepContext) -> None:
        """Look away."""
        self._look_away()
        self._gradients = {}

    def _look_away(self) -> None:
        for delta in self.deltas.values():
            delta.observer = None

    def _train(self, delta: "SpIEL", state: State, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, decay = float(group["lr"]), group.get("weight_decay", 0.0)
        values = delta.values.detach()
        if self.config.selection == "sm3":
            sm3_step(values, gradient, delta.index, **state, lr=lr, weight_decay=decay)
            return
        adam_step(
            values,
            gradient,
            **state,
            lr=lr,
            betas=group.get("betas", (0.9, 0.999)),
            eps=group.get("eps", 1e-8),
            weight_decay=decay,
        )

    # -- moving

    def share(self, done: int) -> float:
        """Return the share of the entries that is dropped after a number of steps."""
        if self.config.schedule == "cosine":
            return self.config.rate * (1 + math.cos(math.pi * done / self.steps)) / 2
        return self.config.rate * (1 - done / self.steps) if self.selections else 1.0

    @torch.no_grad()
    def _select(self, name: str, delta: "SpIEL", share: float, betas: tuple[float, float]) -> None:
        """Drop and grow entries of one site."""
        state, size = self.moments[name], delta.shape[0] * delta.shape[1]
        count = int(share * len(delta.values))
        if self.config.selection == "sm3":
            scores = torch.outer(state["row"], state["column"]).flatten()
            everywhere = torch.arange(size, device=scores.device)
            regrow(delta.index, delta.values.detach(), everywhere, scores, count, size)
            return
        seen = self.seen[name]
        if seen.candidates is None or seen.total is None or seen.squares is None:
            return  # no gradient has reached the layer
        scores = seen.total.abs()
        grown = regrow(delta.index, delta.values.detach(), seen.candidates, scores, count, size)
        slots, picked, age = grown.slots, grown.picked, seen.steps
        state["mean"][slots] = seen.total[picked] / age * (1 - betas[0] ** age)
        state["square"][slots] = seen.squares[picked] / age * (1 - betas[1] ** age)
        state["age"][slots] = float(age)

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return moments, and what an open window has seen."""
        kept = ("candidates", "total", "squares")
        return {
            "selections": self.selections,
            "open": self.open,
            "moments": self.moments,
            "seen": {
                name: {"steps": item.steps, **{key: getattr(item, key) for key in kept}}
                for name, item in self.seen.items()
                if item.steps
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.selections, self.open = state["selections"], state["open"]
        for name, saved in state["moments"].items():
            for key, value in saved.items():
                self.moments[name][key].copy_(value)
        devices = {name: delta.values.device for name, delta in self.deltas.items()}
        self.seen = {
            name: Seen(**{k: v if k == "steps" else v.to(devices[name]) for k, v in item.items()})
            for name, item in state["seen"].items()
        }
