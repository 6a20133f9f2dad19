"""`--lr auto`: the learning rate of a run, searched on validation images.

Rates lie on a logarithmic grid of two decades. Its middle is the backbone's rate times what the
method needed on the tiny model; it is tried first, then its neighbours outwards, so it is always
among those that are trained to the end. Each trial trains the recipe on the same shots, from the
same initial values, in the same order, on a cosine of the trial's length. It is scored after 1/9,
1/3 and all of its steps, and goes on only if it is in the best third of what was scored there so
far (optuna's successive halving). The best rate of those that reached the end is taken:

    score = (right answers + 1 / (1 + loss)) / images

so the loss decides between equal counts only, which are common among a few validation images.

Validation images are the data set's own (up to four a class, as CoOp draws them), of the classes
that are trained. Without any, up to four of a class's shots, at most half of them, are held out;
the training that follows uses all shots again. Test images are never looked at.

One search, with the first seed, serves all seeds of a run: the rate is a setting of the method, and
seeds that share it differ in nothing but their draws. It is written to lr_search.json, and a
resumed run reads it there.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from tasks.fewshot.config import AUTO, FewshotConfig
from tasks.fewshot.datasets import Dataset
from tasks.fewshot.evaluate import TestImages
from tasks.fewshot.experiment import Experiment
from tasks.fewshot.rate_trial import REDUCTION, Trial, tried, with_rate
from tasks.fewshot.recipe import rate_of
from tasks.fewshot.report import print_note
from tasks.fewshot.sampling import VALIDATION_SHOTS, Item, by_class, few_shot
from tasks.fewshot.shots import Shots
from visionlora.errors import ConfigError, DataError, DivergedError, OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory

FILE = "lr_search.json"
REACH = 10.0
"""The grid goes from its middle divided by this to its middle times this."""
OWN = "validation images of the data set"
HELD_OUT = "images held out of the shots"


@dataclass(frozen=True)
class RateSearch:
    """What a search found and what it cost."""

    lr: float
    trials: list[Trial]
    seed: int
    validation: str
    """Where the validation images come from."""
    images: int
    steps: int
    """Optimiser steps of all trials together."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RateSearch":
        """Rebuild from `to_dict`."""
        return cls(**{**values, "trials": [Trial(**trial) for trial in values["trials"]]})


def require_optuna() -> Any:
    """Return the optuna package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--lr auto needs optuna: pip install 'visionlora[search]'") from error
    return optuna


def check_search(experiment: Experiment, shots: Shots) -> None:
    """Refuse `--lr auto` where it cannot work, before anything is written.

    Raises:
        VisionLoraError: optuna is missing, or no image can be spared for validation.
    """
    if experiment.config.lr == AUTO:
        require_optuna()
        validation_split(experiment, shots)


def check_spare(dataset: Dataset, shots: int) -> None:
    """Refuse what leaves no image for validation, before shots are drawn.

    Raises:
        DataError: one shot a class, and no validation images.
    """
    if not dataset.val and shots < 2:
        raise DataError(
            f"--lr auto: {dataset.name} has no validation images, and one shot a class leaves none "
            "to hold out; give --lr a number, or more --shots"
        )


def with_searched_rate(
    experiment: Experiment, directory: RunDirectory, shots: Shots | None = None
) -> Experiment:
    """Return the run with a number in the place of `--lr auto`; any other run as it is.

    A resumed run takes what is in its folder.

    Args:
        experiment: The run.
        directory: Its folder.
        shots: The training images of its first seed, if they are there already.
    """
    if experiment.config.lr != AUTO:
        return experiment
    file = directory.path / FILE
    if directory.resume and file.is_file():
        try:
            found = RateSearch.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{file} is damaged; remove it to search again") from error
    else:
        if directory.main:
            tried, steps = experiment.config.lr_trials, experiment.config.lr_steps
            print_note(f"searching the learning rate: {tried} trials of up to {steps} steps")
        found = search(experiment, shots or experiment.shots(experiment.config.seed[0]))
        if directory.main:
            write_text_atomically(file, json.dumps(found.to_dict(), indent=2) + "\n")
    return replace(with_rate(experiment, found.lr), lr_search=found.to_dict())


def search(experiment: Experiment, shots: Shots) -> RateSearch:
    """Try rates on validation images, and return the best with all that was tried.

    Args:
        experiment: the run, with its trials and their steps filled in.
        shots: the training images of its first seed.

    Raises:
        DataError: no image can be spared for validation.
        DivergedError: no rate trained to the end.
    """
    optuna = require_optuna()
    config, began = experiment.config, time.monotonic()
    assert config.lr_trials is not None
    train, held, source = validation_split(experiment, shots)
    images = TestImages(held, experiment.backbone.transform)
    rates = grid(middle(config), config.lr_trials)
    space = optuna.distributions.FloatDistribution(min(rates), max(rates), log=True)
    with _quiet(optuna):
        study = optuna.create_study(
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, REDUCTION, 0),
            sampler=optuna.samplers.RandomSampler(seed=config.seed[0]),
        )
        trials = []
        for rate in rates:
            study.enqueue_trial({"lr": rate})
            asked = study.ask({"lr": space})
            trial, value = tried(experiment, rate, train, images, asked)
            finished = trial.outcome == "finished"
            state = optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.PRUNED
            study.tell(asked, value if finished else None, state)
            trials.append(trial)
    if all(trial.outcome != "finished" for trial in trials):
        raise DivergedError(
            f"--lr auto: no learning rate from {min(rates):.2g} to {max(rates):.2g} trains "
            f"{config.method}; give --lr a number"
        )
    return RateSearch(
        lr=study.best_params["lr"],
        trials=trials,
        seed=config.seed[0],
        validation=source,
        images=len(held) - len(images.skipped),
        steps=sum(trial.steps for trial in trials),
        seconds=round(time.monotonic() - began, 3),
    )


def middle(config: FewshotConfig) -> float:
    """Return the rate in the middle of the grid."""
    return config.preset.lr * rate_of(config.method)


def grid(centre: float, count: int) -> list[float]:
    """Return `count` rates from `centre` outwards, rounded to three digits, in the order of trial.

    They are evenly spaced in the logarithm; an even count leaves out the lowest of the odd grid.
    """
    half = count // 2
    places = sorted(range(-half, half + 1), key=lambda place: (abs(place), -place))[:count]
    return [float(f"{centre * REACH ** (place / max(half, 1)):.3g}") for place in places]


def validation_split(experiment: Experiment, shots: Shots) -> tuple[Shots, list[Item], str]:
    """Return the images to train a trial on, those to score it with, and where these come from."""
    config, dataset = experiment.config, experiment.dataset
    _, drawn = few_shot(
        dataset.train, dataset.val, config.shots, config.seed[0], config.short_class
    )
    if own := [item for item in drawn if item.label in experiment.trained_classes]:
        return shots, own, OWN
    held: dict[int, Item] = {}
    for group in by_class(shots.items).values():
        different = list({id(item): item for item in group}.values())  # some may be repeated
        spared = min(VALIDATION_SHOTS, len(different) // 2)
        held |= {id(item): item for item in different[len(different) - spared :]}
    if not held:  # also where every class has one readable image only
        check_spare(replace(dataset, val=[]), 1)
    kept = [index for index, item in enumerate(shots.items) if id(item) not in held]
    train = Shots(
        [shots.images[index] for index in kept],
        shots.labels[kept],
        [shots.items[index] for index in kept],
        shots.skipped,
    )
    return train, list(held.values()), HELD_OUT


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep optuna's line per trial off the screen."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
