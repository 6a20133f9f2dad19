"""Looking at held-out pictures while training, and keeping the weights that restore them best."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import visionlora as vl
from tasks.restoration.training.held_out import Example, measured
from visionlora.dynamics import Dynamics, StepContext
from visionlora.training import RunDirectory

Say = Callable[[str], None]


class Validation(Dynamics):
    """Measures every so many steps and after the last one.

    What was best is part of the state, so a resumed run keeps what the uninterrupted one keeps.

    Args:
        model: the network, outside of any wrapper.
        examples: held-out pictures.
        every: steps between two measurements.
        steps: length of the run.
        keep: whether the best weights are kept.
        directory: whose log gets the figures.
        say: prints a line.
    """

    name = "validation"

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        every: int,
        steps: int,
        *,
        keep: bool,
        directory: RunDirectory,
        say: Say,
    ) -> None:
        self.model = model
        self.examples = examples
        self.every = every
        self.steps = steps
        self.keep = keep
        self.directory = directory
        self.say = say
        self.psnr = float("-inf")
        self.step = 0
        self._best: dict[str, Tensor] = {}

    def on_step_end(self, context: StepContext) -> None:
        """Measure if it is time."""
        done = context.step + 1
        if done % self.every and done != self.steps:
            return
        device = next(self.model.parameters()).device
        psnr = measured(self.model, self.examples, device).psnr
        if self.directory.main:
            self.directory.log({"step": done, "val_psnr": round(psnr, 4)})
            self.say(f"step {done}: {psnr:.3f} dB on validation pictures")
        if psnr > self.psnr or not self.keep:
            self.psnr, self.step = psnr, done
            if self.keep:
                self._best = {
                    name: parameter.detach().cpu().clone()
                    for name, parameter in vl.trainable_parameters(self.model)
                }

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights into the model."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._best.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure, its step and its weights."""
        return {"psnr": self.psnr, "step": self.step, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.psnr, self.step, self._best = state["psnr"], state["step"], state["best"]
