"""Which of several learning rates a method gets: each is tried on validation images.

A trial is as long as the run. Test images are never looked at, and in base-to-new the new classes
are not either: the protocol is played on the base classes alone, whose first half is trained and
whose both halves are validated, and the harmonic mean decides. Elsewhere the accuracy does. Few
images are noisy: of the rates within a point of the best the smallest is taken, which leaves the
backbone as it is where nothing speaks against it. One that diverges is out. The choice is made once
for a method on a data set, at the largest number of shots.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tasks.fewshot.backbones import Backbone
from tasks.fewshot.datasets import Dataset, for_validation, of_classes
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.protocol.config import Cell, ProtocolConfig, path_name
from tasks.fewshot.protocol.progress import Progress
from tasks.fewshot.sampling import base_and_new
from tasks.fewshot.train import MAY_CHANGE, run_seed
from visionlora.errors import DivergedError
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory

TOLERANCE = 1.0
LEAST_CLASSES = 4
"""Fewer base classes are not halved again; their accuracy decides."""


@dataclass(frozen=True)
class Trial:
    """One rate of one method, tried with one seed."""

    dataset: str
    method: str
    lr: float
    seed: int

    @property
    def path(self) -> str:
        """Folder of its runs, below the protocol's."""
        return f"rates/{path_name(self.dataset)}/{path_name(self.method)}/lr-{self.lr:g}"

    def __str__(self) -> str:
        return f"{self.dataset}, {self.method}, rate {self.lr:g}, seed {self.seed}"


def trials(config: ProtocolConfig, dataset: str, method: str) -> list[Trial]:
    """Return what is tried before a method is trained on a data set: nothing, for one rate."""
    rates = [lr for lr in config.lr or () if lr != "auto"]
    if len(rates) < 2:
        return []
    seeds = config.rate_seed or config.seed
    return [Trial(dataset, method, float(lr), seed) for lr in sorted(rates) for seed in seeds]


def validation_experiment(
    config: ProtocolConfig, dataset: Dataset, backbone: Backbone
) -> Experiment:
    """Return the run in which rates are compared: shots and validation images of classes in use.

    Raises:
        DataError: a class whose images do not suffice for validation.
    """
    shots = max(config.all_shots)
    usual = config.cell(config.method[0], dataset.name, shots).resolved(dataset.templates)
    setting = "all"
    if config.name == "base-to-new":
        base, _ = base_and_new(len(dataset.classes))
        dataset = of_classes(dataset, base)
        setting = "base-to-new" if len(base) >= LEAST_CLASSES else "all"
    changes: dict[str, Any] = {"setting": setting, "test_on": "val", "steps": usual.steps}
    return prepare(config.cell(config.method[0], dataset.name, shots, **changes), dataset, backbone)


def choose_rate(
    config: ProtocolConfig,
    experiment: Experiment,
    cell: Cell,
    directory: RunDirectory,
    progress: Progress,
) -> tuple[float, str]:
    """Return the rate of a method on a data set, and what to say of it.

    What was tried is left in rate.json.
    """
    wanted = trials(config, cell.dataset, cell.method)
    found: dict[float, list[float | None]] = {}
    diverged: dict[float, str] = {}
    seconds = 0.0
    for trial in wanted:
        try:
            value, spent = None, 0.0
            if trial.lr not in diverged:
                value, spent = _try(config, experiment, trial, directory)
            seconds += spent
        except DivergedError as error:
            value, diverged[trial.lr] = None, str(error)
        found.setdefault(trial.lr, []).append(value)
        progress.done((str(trial), trial.method), _said(value))
    means = {
        lr: float(np.mean([value for value in values if value is not None]))
        for lr, values in found.items()
        if None not in values
    }
    if not means:
        raise DivergedError(f"no learning rate trains: {next(iter(diverged.values()))}")
    best = gentlest(means)
    if directory.main:
        content = {
            "lr": best,
            "seeds": config.rate_seed or config.seed,
            "figure": _figure(experiment),
            "seconds": round(seconds, 1),
            "validation": {f"{lr:g}": found[lr] for lr in found},
        }
        file = directory.path / wanted[0].path / ".." / "rate.json"
        write_text_atomically(file.resolve(), json.dumps(content, indent=2) + "\n")
    note = ""
    if best in (min(found), max(found)):
        where = f"{cell.method} on {cell.dataset}"
        note = f"The best rate of {where}, {best:g}, is at the edge of those tried."
    return best, note


def gentlest(means: Mapping[float, float]) -> float:
    """Return the smallest rate whose validation figure is within a point of the best."""
    top = max(means.values())
    return min(lr for lr, value in means.items() if value >= top - TOLERANCE)


def _try(
    config: ProtocolConfig, experiment: Experiment, trial: Trial, directory: RunDirectory
) -> tuple[float, float]:
    """Return the validation figure of a trial, and the seconds it took."""
    shared = experiment.config
    settings = replace(shared, method=trial.method, lr=trial.lr, adapter={}, init_batches=None)
    settings = settings.resolved(tuple(shared.template or ()))
    folder = directory.child(trial.path)
    folder.write_config(settings, volatile=MAY_CHANGE)
    one = replace(experiment, config=settings)
    result = run_seed(one, trial.seed, folder.child(f"seed_{trial.seed}"), None)
    return float(result[_figure(one)]), float(result["wall_seconds"])


def _figure(experiment: Experiment) -> str:
    return "harmonic_mean" if experiment.config.setting == "base-to-new" else "accuracy"


def _said(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.1f} % on validation images"


def check_validation(dataset: Dataset) -> None:
    """Refuse a data set whose classes cannot spare images for validation.

    Raises:
        DataError: naming the class.
    """
    for_validation(dataset)
