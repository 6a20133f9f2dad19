"""Adapt and predict for all tabs: one frozen backbone, one user of it at a time.

Adapters live in files, never in the backbone between two calls: whoever asks gets the backbone with
their own adapter loaded, which is taken out again at the end. What is predicted on the page is so
what the handed-out files predict elsewhere.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import visionlora as vl
from tasks.fewshot.adapt import adapt
from tasks.fewshot.adapter_files import load_adapter, read_description, save_adapter
from tasks.fewshot.app.holdout import Measure, Part, plan
from tasks.fewshot.app.pictures import Pictures
from tasks.fewshot.backbones import TINY, load_backbone
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.datasets import DEFAULT_TEMPLATE, Dataset
from tasks.fewshot.evaluate import Scores, merged_for
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.predict import classifying, predict
from tasks.fewshot.predictions import Prediction
from tasks.fewshot.templates import check_templates
from tasks.fewshot.train import describe
from tasks.fewshot.vision_only import PREFIX
from visionlora.dynamics import Dynamics, StepContext
from visionlora.errors import ConfigError
from visionlora.training import RunDirectory
from visionlora.training.device import pick_device, threads

SEED = 1
MAX_STEPS = 500
"""Steps of one training unless the user says otherwise: less than the recipe's, since people wait.
"""
BEST = 3
"""How many classes are named per predicted picture."""

Tell = Callable[[float, str], None]
"""Called with the share that is done and a line that says what is going on."""


class Cancelled(Exception):
    """The user pressed the cancel button."""


@dataclass(frozen=True)
class Settings:
    """What a user can choose; None stands for the recipe's value."""

    method: str = "block-lora"
    shots: int = 16
    steps: int | None = None
    lr: float | None = None
    template: str = DEFAULT_TEMPLATE
    measure: Measure = "automatic"


@dataclass(frozen=True)
class Adapted:
    """A finished adapter: where its files are, and what is known about it."""

    folder: Path
    classes: tuple[str, ...]
    method: str
    sentence: str
    """How accuracy was measured."""
    scores: Scores | None
    """Test pictures, scored by adapters that had not seen them; None if nothing was measured."""
    zero_shot: Scores | None
    """The same pictures, scored before adapting."""
    steps: int
    trainable: int
    seconds: float
    unreadable: list[str] = field(default_factory=list)
    doubles: int = 0
    random_weights: bool = False


class Engine:
    """The frozen backbone of the page and a lock around it."""

    def __init__(self, backbone: str = TINY, pretrained: str | None = None, device: str = "auto"):
        if backbone.startswith(PREFIX):
            raise ConfigError(
                f"the page adapts CLIP models, and {backbone} has no text tower; "
                "use scripts/fewshot.py"
            )
        self.device = pick_device(device)
        self.backbone = load_backbone(backbone, pretrained)
        self.defaults = FewshotConfig(backbone=backbone, pretrained=pretrained, device=device)
        self._lock = threading.Lock()

    def adapt(
        self,
        pictures: Pictures,
        settings: Settings,
        folder: Path,
        tell: Tell,
        cancel: threading.Event,
    ) -> Adapted:
        """Train an adapter into `folder`, measuring it as `settings` say.

        Raises:
            Cancelled: `cancel` was set; the folder is then of no use.
            VisionLoraError: settings or pictures that cannot be used.
        """
        check_templates([settings.template])  # a sentence, not a file of this computer
        config = replace(
            self.defaults,
            dataset="folder:pictures",
            method=settings.method.strip(),
            shots=settings.shots,
            steps=settings.steps,
            limit_steps=None if settings.steps else MAX_STEPS,
            lr=settings.lr,
            template=[settings.template],
            checkpoint_every=0,
            seed=[SEED],
        )
        classes = tuple(pictures.classes)
        parts = plan(pictures.classes, settings.shots, settings.measure)
        began = time.monotonic()
        with self._alone():
            watch = _Watch(tell, cancel, parts.trainings)
            before: list[Scores] = []
            after: list[Scores] = []
            for number, part in enumerate([*parts.rounds, parts.final]):
                dataset = Dataset("pictures", classes, part.train, [], part.test)
                experiment = prepare(config, dataset, self.backbone)
                place = folder / f"training_{number}"
                trainable = self._train(experiment, part, place, watch, before, after)
        assert experiment.config.steps is not None
        return Adapted(
            folder=place,
            classes=classes,
            method=config.method,
            sentence=parts.sentence,
            scores=_together(after),
            zero_shot=_together(before),
            steps=experiment.config.steps,
            trainable=trainable,
            seconds=time.monotonic() - began,
            unreadable=pictures.unreadable,
            doubles=pictures.doubles,
            random_weights=self.backbone.random_weights,
        )

    def predict(self, folder: Path, files: Sequence[Path]) -> list[Prediction]:
        """Return the best classes of every picture by the adapter in `folder`."""
        with self._alone():
            load_adapter(folder, backbone=self.backbone)
            try:
                description, transform = read_description(folder)
                with classifying(self.backbone, description, transform, self.device) as model:
                    batches = predict(
                        model, files, description.classes, transform, self.device, BEST
                    )
                    return [item for batch in batches for item in batch]
            finally:
                vl.eject(self.backbone.clip)

    def _train(
        self,
        experiment: Experiment,
        part: Part,
        place: Path,
        watch: "_Watch",
        before: list[Scores],
        after: list[Scores],
    ) -> int:
        """Train and save one adapter, score its test pictures, return how much it trained."""
        clip = self.backbone.clip
        shots = experiment.shots(SEED)
        if part.test:
            before.append(experiment.score())
        watch.begin(experiment.config.steps or 1)
        experiment.inject(SEED)
        try:
            _, trainable = adapt(experiment, SEED, shots, RunDirectory(place), dynamics=[watch])
            if part.test:
                with merged_for(clip, experiment.config.recipe.method):
                    after.append(experiment.score())
            save_adapter(place, clip, describe(experiment))
            return trainable
        finally:
            vl.eject(clip)
            clip.eval()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # The tiny model's operations are too small for several threads.
        with self._lock, threads(1 if self.backbone.name == TINY else None):
            yield


class _Watch(Dynamics):
    """Tells how far a training is, and ends it between two steps once it is cancelled."""

    name = "watch"

    def __init__(self, tell: Tell, cancel: threading.Event, trainings: int) -> None:
        self.tell = tell
        self.cancel = cancel
        self.trainings = trainings
        self.training = 0
        self.steps = 1
        self.seconds = 0.0
        self.done = 0

    def begin(self, steps: int) -> None:
        """Get ready for the next training."""
        self.training += 1
        self.steps = steps
        self._look(0)

    def on_step_begin(self, context: StepContext) -> None:
        """Note the time."""
        self._began = time.monotonic()

    def on_step_end(self, context: StepContext) -> None:
        """Tell what is done and left."""
        self.seconds += time.monotonic() - self._began
        self.done += 1
        self._look(context.step + 1)

    def _look(self, step: int) -> None:
        if self.cancel.is_set():
            raise Cancelled
        total = self.trainings * self.steps
        round_ = f"training {self.training} of {self.trainings}, " if self.trainings > 1 else ""
        left = self.seconds / self.done * (total - self.done) if self.done else None
        estimate = "" if left is None else f", about {_duration(left)} left"
        self.tell(self.done / total, f"{round_}step {step} of {self.steps}{estimate}")


def _duration(seconds: float) -> str:
    """Return a rough time in words that people use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _together(parts: list[Scores]) -> Scores | None:
    """Return the scores of all rounds as one."""
    if not parts:
        return None
    return Scores(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
