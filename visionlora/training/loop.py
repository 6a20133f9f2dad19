"""The training loop of all tasks: steps, log, checkpoints, exact resume."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visionlora.dynamics import Dynamics, Stepper, StepReport
from visionlora.errors import DataError
from visionlora.ranks import controllers_of, finalize
from visionlora.ranks.optimizer import set_rates
from visionlora.training.accelerator import AcceleratorBackend
from visionlora.training.interrupt import DeferredInterrupt
from visionlora.training.progress import Progress
from visionlora.training.provenance import peak_memory_mb
from visionlora.training.randomness import random_state, restore_random_state, seed_everything
from visionlora.training.rundir import RunDirectory, check_same, plain
from visionlora.training.schedules import Schedule, constant
from visionlora.training.settings import TrainSettings
from visionlora.training.state import TrainedState

# Changing these between two parts of a run changes no number in it.
_VOLATILE = ("checkpoint_every", "keep_checkpoints", "tracker", "device")


@dataclass(frozen=True)
class FitResult:
    """Figures of a finished training."""

    steps: int
    """Steps done, those before a resume included."""
    loss: float
    """Mean loss over the last logged window."""
    skipped: int
    """Steps given up because of a non-finite loss or gradient."""
    step_seconds: float
    """Mean seconds per step."""
    peak_memory_mb: float
    """Peak memory of this process."""
    resumed_from: int | None
    """Step of the checkpoint that the run continued, None for a run from the start."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    batches: Callable[[int], Any],
    settings: TrainSettings,
    run: RunDirectory,
    *,
    dynamics: Sequence[Dynamics] = (),
    schedule: Schedule | None = None,
    held_out: Callable[[int], Any] | None = None,
    figures: Callable[[float], Mapping[str, float]] | None = None,
) -> FitResult:
    """Train the parameters of `optimizer` and leave the model, in place, as trained.

    Methods that allocate rank bring their controllers, which may replace, add and remove parameters
    while training; at the end their sites become plain LoRA of the ranks they got (see
    `visionlora.finalize`), so that what is saved is what was trained. The optimiser then holds
    parameters that are no longer in the model.

    The model is moved to the device; its train or eval mode is the caller's. The global random
    generators are seeded with `settings.seed` plus the rank, and put back at the end.
    A resumed run on the CPU, with the same number of threads, repeats the uninterrupted one bit for
    bit. A skipped step changes no parameter, but its forward has updated running statistics.

    Args:
        model: called as `loss_fn(model, batch)`, inside a DDP wrapper when there are several
            processes, so the loss must go through `model(...)`.
        optimizer: built by the caller over the trainable parameters; parameter groups keep their
            own learning rates.
        loss_fn: returns the mean loss of a batch as a scalar.
        batches: returns the batch of a micro-step (0 to steps * accumulate - 1), always the same
            one for the same number; with several processes, the part of this process
            (see `visionlora.training.sampler`).
        settings: how long and how precisely to train.
        run: where log and checkpoints go; if it was opened with `resume`, training continues from
            the newest undamaged checkpoint.
        dynamics: callbacks around every step.
        schedule: multiplier of the learning rates as a function of the step.
        held_out: like `batches`, over examples that `batches` never returns, for the steps of
            methods that search on held-out data (DiffoRA); without it those steps get the next
            batches of `batches`, which are then only held out from the steps before.
        figures: what else is logged of a mean loss, such as the PSNR that it stands for.

    Raises:
        NeverTrainedError: a trainable tensor is not optimised or the loss does not reach it.
        ConfigError: settings that this machine or the run being resumed does not allow.
        DataError: `batches` raised StopIteration; a checkpoint of all steps done was written.
        OutputError: the run folder cannot be written.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been written.
    """
    with AcceleratorBackend(settings, run) as backend:
        before = random_state(backend.device)
        try:
            trainer = _Trainer(model, optimizer, loss_fn, settings, run, dynamics, backend, figures)
            try:
                trainer.train(batches, held_out or batches, schedule or constant())
            finally:
                trainer.stepper.finish()
            return trainer.result()
        finally:
            restore_random_state(before, backend.device)


class _Trainer:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[nn.Module, Any], torch.Tensor],
        settings: TrainSettings,
        run: RunDirectory,
        dynamics: Sequence[Dynamics],
        backend: AcceleratorBackend,
        figures: Callable[[float], Mapping[str, float]] | None,
    ) -> None:
        model.to(backend.device)
        self.model = model
        self.optimizer = optimizer
        self.controllers = controllers_of(model, optimizer, settings.steps)
        self.trained = TrainedState(model, optimizer)
        self.stepper = Stepper(
            model,
            optimizer,
            dynamics=[*self.controllers, *dynamics],
            backend=backend,
            clip_norm=settings.clip_norm,
            max_skipped=settings.max_skipped,
        )
        self.loss_fn = loss_fn
        self.settings = settings
        self.run = run
        self.backend = backend
        self.figures = figures
        self.window = _Window()
        self.seconds = 0.0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        seed_everything(settings.seed + backend.rank)
        self.resumed_from = self._resume() if run.resume else None
        self.wrapped = self._wrap()
        if settings.checkpoint_every and backend.rank == 0:
            run.reserve(self.trained.size())

    def train(
        self,
        batches: Callable[[int], Any],
        held_out: Callable[[int], Any],
        schedule: Schedule,
    ) -> None:
        """Run the steps that are left."""
        settings, backend, stepper = self.settings, self.backend, self.stepper
        start = stepper.steps
        backend.start_tracker(start)
        shown = Progress(settings.steps, self.run.path.name, start=start, enabled=backend.rank == 0)
        with DeferredInterrupt() as interrupt, shown:
            for step in range(start, settings.steps):
                began = time.perf_counter()
                rate = self._set_rate(schedule(step))
                first = step * settings.accumulate
                apart = any(item.held_out(step) for item in self.controllers)
                source = held_out if apart else batches
                micro = self._read(source, first)
                report = stepper.step(micro, self._loss)
                if report.changed:
                    self.wrapped = self._wrap()
                self.seconds += time.perf_counter() - began
                self._record(report, rate)
                shown.update(stepper.steps, report.loss, rate)
                last = stepper.steps == settings.steps
                stop = backend.any(interrupt.asked)
                if stop or self._due(last):
                    self._save()
                if stop:
                    raise KeyboardInterrupt

    def _read(self, source: Callable[[int], Any], first: int) -> list[Any]:
        """Return the micro-batches of a step; where they end, keep what was learnt and say so."""
        found = []
        try:
            for index in range(self.settings.accumulate):
                found.append(source(first + index))
        except StopIteration:
            pass
        if self.backend.any(len(found) < self.settings.accumulate):
            done, wanted = self.stepper.steps, self.settings.steps
            kept = ""
            if done > (self.resumed_from or 0):
                self._save()
                kept = f"; they are in {self.run.checkpoints.path}, to be resumed"
            raise DataError(
                f"the data ended after {done} of {wanted} steps{kept}: batches must return one for "
                f"each of the {wanted * self.settings.accumulate} micro-steps (see StepSampler)"
            )
        return found

    def result(self) -> FitResult:
        """Leave the model as it is to be saved, and return the figures of the run."""
        if self.controllers:
            finalize(self.model)
        stepper = self.stepper
        return FitResult(
            steps=stepper.steps,
            loss=self.window.latest,
            skipped=stepper.skipped,
            step_seconds=self.seconds / max(stepper.steps, 1),
            peak_memory_mb=peak_memory_mb(),
            resumed_from=self.resumed_from,
        )

    def _wrap(self) -> nn.Module:
        """Return what is to be called, made for the parameters that there are now."""
        self.stepper.model = self.backend.wrap(self.model)
        return self.stepper.model

    def _loss(self, batch: Any) -> torch.Tensor:
        return self.loss_fn(self.wrapped, self.backend.place(batch))

    def _set_rate(self, multiplier: float) -> float:
        """Set the learning rate of every group and return that of the first."""
        set_rates(self.optimizer, self.stepper.steps, multiplier)
        return float(self.optimizer.param_groups[0]["lr"])

    def _record(self, report: StepReport, rate: float) -> None:
        """Log the mean loss of a window of steps when the window is full."""
        self.window.add(report)
        done = self.stepper.steps
        if done % self.settings.log_every and done != self.settings.steps:
            return
        loss = self.window.close()
        further = self.figures(loss) if self.figures else {}
        figures = {"loss": loss, "lr": rate, "grad_norm": report.grad_norm, **further}
        line = {"step": done, **figures, "skipped": self.stepper.skipped}
        self.run.log({**line, "seconds": round(self.seconds, 3)})
        self.backend.track(figures, done)

    def _due(self, last: bool) -> bool:
        every = self.settings.checkpoint_every
        return every > 0 and (last or self.stepper.steps % every == 0)

    def _save(self) -> None:
        shared = {
            "settings": plain(self.settings),
            "trained": self.trained.capture(),
            "stepper": self.stepper.state_dict(),
            "backend": self.backend.state_dict(),
            "window": [self.window.total, self.window.count, self.window.latest],
            "seconds": self.seconds,
            "wall_seconds": self.run.wall_seconds(),
        }
        self.run.checkpoints.save(
            self.stepper.steps,
            shared,
            random_state(self.backend.device),
            keep=self.settings.keep_checkpoints,
            rank=self.backend.rank,
            processes=self.backend.processes,
            barrier=self.backend.barrier,
        )

    def _resume(self) -> int | None:
        """Take back the newest checkpoint, if there is one, and return its step."""
        checkpoint = self.run.checkpoints.newest()
        if checkpoint is None:
            self.run.truncate_log(0)
            return None
        shared = checkpoint.shared()
        there = {**shared["settings"], "processes": checkpoint.processes}
        here = {**plain(self.settings), "processes": self.backend.processes}
        check_same(there, here, f"{checkpoint.path}", _VOLATILE)
        self.trained.restore(shared["trained"])
        self.stepper.load_state_dict(shared["stepper"])
        self.backend.load_state_dict(shared["backend"])
        self.window = _Window(*shared["window"])
        self.seconds = shared["seconds"]
        self.run.seconds_before = shared["wall_seconds"]
        restore_random_state(checkpoint.own(self.backend.rank), self.backend.device)
        self.run.truncate_log(self.stepper.steps)
        # Nobody may save, and prune, before everybody has read.
        self.backend.barrier()
        return self.stepper.steps


@dataclass
class _Window:
    """Mean loss of the applied steps since the last line of the log."""

    total: float = 0.0
    count: int = 0
    latest: float = float("nan")

    def add(self, report: StepReport) -> None:
        if not report.skipped:
            self.total += report.loss
            self.count += 1

    def close(self) -> float:
        self.latest = self.total / self.count if self.count else float("nan")
        self.total, self.count = 0.0, 0
        return self.latest
