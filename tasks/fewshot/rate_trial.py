"""One trial of `--lr auto`: a training that is scored at rungs, and stopped where it is behind.

`tasks/fewshot/rate_search.py` says how trials are compared.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import visionlora as vl
from tasks.fewshot.adapt import adapt
from tasks.fewshot.evaluate import Scores, TestImages, merged_for, score
from tasks.fewshot.experiment import Experiment
from tasks.fewshot.shots import Shots
from visionlora.dynamics import Dynamics, StepContext
from visionlora.errors import DivergedError
from visionlora.training import RunDirectory

REDUCTION = 3
"""One of so many trials goes on at each rung."""
NINTHS = (1, REDUCTION, REDUCTION**2)
"""After how many ninths of its steps a trial is scored."""


@dataclass(frozen=True)
class Trial:
    """One rate: how far it was trained, and its validation figures there."""

    lr: float
    steps: int
    accuracy: float
    """Percent of the validation images."""
    loss: float | None
    """None: not finite."""
    outcome: str
    """finished, stopped or diverged."""


def with_rate(experiment: Experiment, rate: float) -> Experiment:
    """Return the run with a number in the place of `auto`."""
    return replace(
        experiment, config=replace(experiment.config, lr=rate, lr_trials=None, lr_steps=None)
    )


def tried(
    experiment: Experiment, rate: float, shots: Shots, images: TestImages, asked: Any
) -> tuple[Trial, float]:
    """Train one rate until it ends or is stopped; return what came out, and its score."""
    config, clip = experiment.config, experiment.backbone.clip
    assert config.lr_steps is not None
    steps = config.lr_steps
    trial = with_rate(experiment, rate)
    trial = replace(trial, config=replace(trial.config, steps=steps, checkpoint_every=0))
    rungs = Rungs(trial, images, asked)
    outcome = "finished"
    trial.inject(config.seed[0])
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory = RunDirectory(Path(folder) / f"lr_{rate:.3g}")
            adapt(trial, config.seed[0], shots, directory, dynamics=[rungs])
    except _Stopped:
        outcome = "stopped"
    except DivergedError:
        outcome = "diverged"
    finally:
        vl.eject(clip)
    if not math.isfinite(rungs.loss):
        outcome = "diverged"
    loss = round(rungs.loss, 4) if math.isfinite(rungs.loss) else None
    return Trial(rate, rungs.steps, round(rungs.accuracy, 2), loss, outcome), rungs.value


class _Stopped(Exception):
    """A trial that is not worth more steps."""


class Rungs(Dynamics):
    """Scores the model at the rungs of a trial, and stops the trial that optuna prunes."""

    name = "rungs"

    def __init__(self, experiment: Experiment, images: TestImages, asked: Any) -> None:
        assert experiment.config.steps is not None
        self.experiment = experiment
        self.images = images
        self.asked = asked
        self.last = experiment.config.steps
        # Two rungs of a very short trial may fall together; the later one then counts.
        self.rungs = {math.ceil(self.last * ninth / NINTHS[-1]): ninth for ninth in NINTHS}
        self.steps, self.accuracy, self.loss, self.value = 0, 0.0, math.nan, 0.0

    def on_step_end(self, context: StepContext) -> None:
        self.steps = context.step + 1
        rung = self.rungs.get(self.steps)
        if rung is None:
            return
        self._score(context.mean)
        self.asked.report(self.value, rung)
        if self.steps < self.last and (not math.isfinite(self.loss) or self.asked.should_prune()):
            raise _Stopped

    def _score(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Score the merged model; the processes agree on their mean."""
        experiment = self.experiment
        config, clip = experiment.config, experiment.backbone.clip
        training = {module: module.training for module in clip.modules()}
        with merged_for(clip, config.recipe.method):
            scores = score(
                experiment.classifier(experiment.trained_classes),
                self.images,
                experiment.device,
                config.precision,
            )
        for module, mode in training.items():
            module.training = mode
        figures = torch.tensor(_figures(scores), device=experiment.device)
        right, self.loss = (float(figure) for figure in mean(figures))
        self.accuracy = 100 * right / len(scores.labels)
        self.value = (right + 1 / (1 + self.loss)) / len(scores.labels) if self.loss >= 0 else 0.0


def _figures(scores: Scores) -> tuple[float, float]:
    """Return the right answers and the mean loss; logits that are not finite give 0 and NaN."""
    logits, labels = torch.from_numpy(scores.logits), torch.from_numpy(scores.labels)
    if not logits.isfinite().all():
        return 0.0, math.nan
    return float((logits.argmax(1) == labels).sum()), float(F.cross_entropy(logits, labels))
