"""The one training step that every task calls: accumulation, AMP, second pass, clipping, events.

The order of events is fixed (see `visionlora.dynamics.base`), so that two dynamics compose in the
same way in every task. What depends on the machine (loss scaling, autocast, several processes) is
behind the small `Backend` protocol.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visionlora.dynamics.backend import Backend, PlainBackend
from visionlora.dynamics.base import Dynamics, StepContext, trainable
from visionlora.dynamics.replay import Replay
from visionlora.errors import ConfigError, DivergedError, NeverTrainedError

__all__ = ["StepReport", "Stepper"]

LossFn = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    changed: bool = False
    """Whether the set of parameters changed, so that a data-parallel wrapper must be renewed."""


class Stepper:
    """Runs training steps with dynamics around one optimiser.

    Args:
        model: the model as it is called, inside its data-parallel wrapper if it has one.
        optimizer: the plain optimiser.
        dynamics: run in the given order at every event, those that control parameters first.
        backend: precision and processes; one process in full precision by default.
        clip_norm: largest global gradient norm, or None for no clipping.
        max_skipped: how many non-finite steps in a row end the training.

    Raises:
        ConfigError: more than one dynamics wants the second pass, or two share a name.
        NeverTrainedError: the optimiser holds no trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dynamics: Sequence[Dynamics] = (),
        backend: Backend | None = None,
        clip_norm: float | None = None,
        max_skipped: int = 10,
    ) -> None:
        check_dynamics(dynamics)
        if not trainable(optimizer):
            raise NeverTrainedError("the optimizer holds no trainable parameter")
        self.model = model
        self.optimizer = optimizer
        self.dynamics = tuple(sorted(dynamics, key=lambda item: not item.controls))
        self.backend: Backend = PlainBackend() if backend is None else backend
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        self._two_passes = any(item.wants_second_pass for item in self.dynamics)
        self.steps = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._reach_checked = False

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn) -> StepReport:
        """Run one step on the mean loss of `micro_batches`.

        Raises:
            NeverTrainedError: a trainable parameter got no gradient in the first applied step.
            DivergedError: the loss or gradient was non-finite `max_skipped` times in a row.
        """
        if not micro_batches:
            raise ConfigError("a step needs at least one micro-batch, got none")
        replay = Replay(self.model) if self._two_passes else None

        def again() -> None:
            if replay is None:
                raise ConfigError("only a dynamics with wants_second_pass may run the model again")
            with replay:
                self.optimizer.zero_grad(set_to_none=True)
                self._accumulate(context, micro_batches, loss_fn)
                self.backend.unscale(self.optimizer)

        context = StepContext(
            self.steps,
            self.model,
            self.optimizer,
            replay=again,
            loss_scale=self.backend.loss_scale(),
            mean=self.backend.mean,
            micro_batches=len(micro_batches),
        )
        try:
            self._run(context, micro_batches, loss_fn, replay)
        except BaseException:
            for dynamics in self.dynamics:
                dynamics.on_step_failed(context)
            raise
        self.optimizer.zero_grad(set_to_none=True)
        self._reach_checked = self._reach_checked and not context.changed
        return self._account(context)

    def _run(
        self,
        context: StepContext,
        micro_batches: Sequence[Any],
        loss_fn: LossFn,
        replay: Replay | None,
    ) -> None:
        """Run the events of one step."""
        for dynamics in self.dynamics:
            dynamics.on_step_begin(context)
        if replay is not None:
            replay.remember()
        context.loss = self._accumulate(context, micro_batches, loss_fn)
        self.backend.unscale(self.optimizer)
        context.grad_norm = self._gradient_norm()
        context.skipped = not (math.isfinite(context.loss) and math.isfinite(context.grad_norm))
        if not context.skipped:
            self._check_reach()
            for dynamics in self.dynamics:
                if dynamics.wants_second_pass:
                    dynamics.second_pass(context)
        for dynamics in self.dynamics:
            dynamics.on_backward_end(context)
        if not context.skipped:
            self._prepare_gradients(context)
        if context.skipped:
            self.backend.skip()
        else:
            self.backend.step(self.optimizer)
        for dynamics in self.dynamics:
            dynamics.on_step_end(context)

    def _accumulate(
        self, context: StepContext, micro_batches: Sequence[Any], loss_fn: LossFn
    ) -> float:
        """Run forward and backward over all micro-batches and return the mean loss.

        Penalties are not part of what is returned, so that methods with and without can be
        compared; one that is not finite makes the gradient so.
        """
        count = len(micro_batches)
        total: torch.Tensor | None = None
        for index, batch in enumerate(micro_batches):
            last = index == count - 1
            with nullcontext() if last else self.backend.no_sync(self.model):
                with self.backend.autocast():
                    loss = loss_fn(batch)
                _check_loss(loss)
                part = _widened(loss.detach()) / count
                context.micro_batch = index
                for dynamics in self.dynamics:
                    penalty = dynamics.penalty(context)
                    loss = loss if penalty is None else loss + penalty
                self.backend.backward(loss / count)
            total = part if total is None else total + part
        assert total is not None
        # One reading per step: it decides, on every process alike, whether the step is applied.
        return float(self.backend.mean(total))

    def _prepare_gradients(self, context: StepContext) -> None:
        """Run the events between backward and optimiser, and clip in between."""
        for dynamics in self.dynamics:
            dynamics.on_grads_ready(context)
        if self.dynamics:
            context.grad_norm = self._gradient_norm()
            context.skipped = not math.isfinite(context.grad_norm)
            if context.skipped:
                return
        self._clip(context)
        for dynamics in self.dynamics:
            dynamics.on_grads_clipped(context)
        if self.dynamics:
            context.skipped = not math.isfinite(self._gradient_norm())

    def _clip(self, context: StepContext) -> None:
        assert context.grad_norm is not None
        if self.clip_norm is not None and context.grad_norm > self.clip_norm:
            factor = self.clip_norm / context.grad_norm
            torch._foreach_mul_(self._gradients(), factor)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in trainable(self.optimizer) if p.grad is not None]

    def _gradient_norm(self) -> float:
        gradients = self._gradients()
        if not gradients:
            return 0.0
        norms = [_widened(norm) for norm in torch._foreach_norm(gradients)]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _check_reach(self) -> None:
        """Refuse to train on when the loss does not reach some trainable parameter."""
        if self._reach_checked:
            return
        missed = {id(p) for p in trainable(self.optimizer) if p.grad is None}
        if missed:
            named = dict(self.model.named_parameters())
            if not missed & {id(p) for p in named.values()}:
                raise NeverTrainedError(
                    f"the optimizer holds {len(missed)} tensors that the model does not have: "
                    "build it after everything that makes new ones, such as initialise or squeeze"
                )
            names = [name.removeprefix("module.") for name, p in named.items() if id(p) in missed]
            raise NeverTrainedError(
                f"{len(missed)} trainable tensors received no gradient in the first step: "
                f"{shortlist(names)}; the forward does not pass through them (an adapted "
                "layer whose weight is read by other code needs inject(..., mode='dense'))"
            )
        self._reach_checked = True

    def _account(self, context: StepContext) -> StepReport:
        assert context.loss is not None
        assert context.grad_norm is not None
        report = StepReport(
            self.steps, context.loss, context.grad_norm, context.skipped, context.changed
        )
        self.steps += 1
        self.skipped += context.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if context.skipped else 0
        if self._skipped_in_a_row >= self.max_skipped:
            raise DivergedError(
                f"training diverged: loss {report.loss:g} and gradient norm {report.grad_norm:g} "
                f"after {self._skipped_in_a_row} skipped steps in a row (step {self.steps}); "
                "try a smaller learning rate, clip_norm or another precision"
            )
        return report

    def finish(self) -> None:
        """Let every dynamics put back what lasted longer than a step; no step may follow."""
        for dynamics in self.dynamics:
            dynamics.on_run_end()

    def state_dict(self) -> dict[str, Any]:
        """Return counters and the state of every dynamics."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "dynamics": {dynamics.name: dynamics.state_dict() for dynamics in self.dynamics},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ConfigError: the state belongs to other dynamics.
        """
        names = [dynamics.name for dynamics in self.dynamics]
        if sorted(names) != sorted(state["dynamics"]):
            raise ConfigError(
                f"the saved run used the dynamics {sorted(state['dynamics'])}, this one {names}"
            )
        self.steps = state["steps"]
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        for dynamics in self.dynamics:
            dynamics.load_state_dict(state["dynamics"][dynamics.name])


def check_dynamics(dynamics: Sequence[Dynamics]) -> None:
    """Refuse dynamics that cannot share a step."""
    names = [item.name for item in dynamics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two dynamics share the name {twice[0]!r}; give each its own")
    second = [item.name for item in dynamics if item.wants_second_pass]
    if len(second) > 1:
        raise ConfigError(f"at most one dynamics may use the second pass, got {second}")


def shortlist(names: Sequence[str], count: int = 5) -> str:
    """Join the first names and say how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _widened(value: torch.Tensor) -> torch.Tensor:
    """Return half-precision values in float32, others as they are."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_loss(loss: torch.Tensor) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ConfigError(f"the loss function must return one scalar tensor, got {got}")
    if not loss.requires_grad:
        raise NeverTrainedError("the loss does not depend on any trainable parameter")
