"""What a training dynamics sees and when: the events around one optimiser step.

```
on_step_begin      before the first forward: masks, noise seeds, perturbations
  (forward over a micro-batch)
penalty            once per micro-batch: a term that is added to its loss
  (backward; after the last one gradients are unscaled and averaged over processes)
second_pass        for the one dynamics that wants it: may call `context.backward_again()`
on_backward_end    after the last backward, of a skipped step too: put back what was moved
on_grads_ready     gradients are final up to clipping
  (clipping)
on_grads_clipped   the last look at the gradients
  (optimizer.step)
on_step_end        after the optimiser, or after a skipped step
  (zero_grad)
on_run_end         once, when training is over, whatever ended it
```

A step with a non-finite loss or gradient goes from `on_backward_end` straight to `on_step_end`;
where an exception ends a step, `on_step_failed` is called instead. Between `on_step_begin` and
`on_backward_end` a dynamics may hold the model in another state, which it puts back from copies.
Dynamics run in the given order, those with `controls` before all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def _unchanged(value: torch.Tensor) -> torch.Tensor:
    return value


@dataclass
class StepContext:
    """One step as its dynamics see it."""

    step: int
    """Index of the step, from 0; a skipped step counts."""
    model: nn.Module
    """The model, inside its data-parallel wrapper if it has one."""
    optimizer: torch.optim.Optimizer
    """The plain optimiser, whose state may be read and edited."""
    replay: Callable[[], None]
    """Body of `backward_again`, supplied by the Stepper."""
    loss: float | None = None
    """Mean loss over micro-batches and processes, without penalties; known after the backward."""
    grad_norm: float | None = None
    """Global gradient norm before clipping, known after the backward."""
    skipped: bool = False
    """Whether the step was given up because of a non-finite loss or gradient."""
    micro_batch: int = 0
    """Index of the micro-batch that `penalty` is asked for, and that is differentiated then."""
    micro_batches: int = 1
    """How many micro-batches the step has."""
    loss_scale: float = 1.0
    """What a gradient is divided by after the backward, for those who look at one inside it."""
    mean: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    """The mean of a tensor over all processes; every process must ask for it."""
    changed: bool = False
    """Set by who replaces, adds, removes, freezes or thaws parameters in `on_step_end`."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimiser that are trainable at this moment."""
        return trainable(self.optimizer)

    def backward_again(self) -> None:
        """Replace all gradients by those of the same micro-batches at the current parameters.

        Random draws of the model repeat those of the first pass, and running statistics of
        normalisation layers stay as the first pass left them. Call it from `second_pass`.
        """
        self.replay()


class Dynamics:
    """Base of all dynamics: every event does nothing until a subclass says otherwise."""

    name: str = "dynamics"
    """Key of the state in a checkpoint; unique within a run."""
    wants_second_pass: bool = False
    """Whether `second_pass` is called; at most one dynamics of a run may ask for it."""
    controls: bool = False
    """Whether it decides which parameters there are, and so comes before those that edit them."""

    def on_step_begin(self, context: StepContext) -> None:
        """Act before the first forward."""

    def penalty(self, context: StepContext) -> torch.Tensor | None:
        """Return a term that is added to the loss of a micro-batch, or None."""
        return None

    def second_pass(self, context: StepContext) -> None:
        """Compute gradients a second time and combine them with the first."""

    def on_backward_end(self, context: StepContext) -> None:
        """Put back what was moved for the forwards, before anyone else looks at the model."""

    def on_grads_ready(self, context: StepContext) -> None:
        """Act on complete gradients before clipping."""

    def on_grads_clipped(self, context: StepContext) -> None:
        """Act on the gradients that the optimiser is about to use."""

    def on_step_end(self, context: StepContext) -> None:
        """Act after the optimiser, or after a skipped step."""

    def on_step_failed(self, context: StepContext) -> None:
        """Put back what `on_step_begin` changed; an exception is on its way to the caller."""

    def on_run_end(self) -> None:
        """Put back what lasts longer than a step, such as frozen flags: the run is over.

        Called once by `Stepper.finish`, whether the run is complete, interrupted or failed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: nested dicts and lists of numbers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def trainable(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of `optimizer` that require gradients, in order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
