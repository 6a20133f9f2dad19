"""Adapters from task vectors: train LoRA on several tasks, learn a generator, test what it makes.

For every seed: one adapter per task is trained and its last states are recorded; a generator is
trained on them; for every task it makes an adapter from the task vector of *other* support images
than those trained on, which is written to a file, loaded into the base model and tested. To see
that the vector matters, every generated adapter is tested on all the other tasks, too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

import visionlora as vl
from tasks.fewshot.adapt import adapt
from tasks.fewshot.backbones import TINY
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.datasets import Dataset
from tasks.fewshot.evaluate import TestImages
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.report import PLAIN_WIDTH, print_note
from tasks.fewshot.sampling import Item, few_shot
from tasks.fewshot.shots import Shots, load_shots
from tasks.fewshot.task_vector import task_vector
from tasks.fewshot.vision_only import PREFIX
from visionlora.errors import ConfigError
from visionlora.generate import (
    Generator,
    GeneratorConfig,
    SnapshotRecorder,
    TaskSnapshots,
    train_generator,
)
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory
from visionlora.training.device import threads

SUPPORT_SEED = 1000
"""Added to the run's seed for drawing the support images that an adapter is generated from."""
SMALL = GeneratorConfig(channels=(8, 16, 32), latent=32, lr=2e-3, batch_size=8, epochs=15)
"""A generator for the tiny model's adapters of 4,608 entries; it trains in a minute."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Train a generator of LoRA adapters on several few-shot tasks, and test what it generates."""

    tasks: list[str] = field(default_factory=lambda: ["digits@0-3", "digits@4-6", "digits@7-9"])
    """Data sets as in scripts/fewshot.py, each with the classes taken from it: digits@0-3,7."""
    backbone: str = "tiny"
    """Backbone as in scripts/fewshot.py."""
    pretrained: str | None = None
    """Weights as in scripts/fewshot.py."""
    root: str = "data"
    """Folder of the public data sets."""
    shots: int = 16
    """Training images per class, and support images per class for the task vector."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of LoRA, as in --adapter.rank 4."""
    lr: float | None = None
    """Learning rate of the adapters; default from the backbone's recipe."""
    steps: int | None = 160
    """Steps per adapter."""
    snapshot_steps: int = 64
    """How many of the last steps are recorded."""
    snapshot_every: int = 2
    """Steps between two snapshots."""
    generator: GeneratorConfig = SMALL
    """Size and training of the generator."""
    seed: list[int] = field(default_factory=lambda: [1])
    """Run seeds: shots, initial values, order, support images, latent."""
    output: str = "runs/generate"
    """Run folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    test_on: Literal["test", "val"] = "test"
    """val: test on validation images instead, to choose settings without looking at the test."""
    record: str | None = None
    """Also write the closing table to this file, one JSON line per task."""

    def __post_init__(self) -> None:
        """Check what the parts of the run do not check themselves."""
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"--tasks needs at least two different tasks, got {self.tasks}")
        if self.backbone.startswith(PREFIX):
            raise ConfigError(
                f"adapters are generated from class names, and {self.backbone} has no text tower"
            )


@dataclass(frozen=True)
class Task:
    """One task: an experiment over some classes of a data set, with its zero-shot accuracy."""

    name: str
    experiment: Experiment
    zero_shot: float

    def vector(self, shots: Shots) -> Tensor:
        """Return the task vector of some support images."""
        return task_vector(self.experiment.classifier(), shots.images)

    def accuracy(self, adapter: Path | None = None) -> float:
        """Return the accuracy of the base model, or with an adapter file, in percent."""
        clip = self.experiment.backbone.clip
        if adapter is None:
            return self.experiment.score().accuracy()
        vl.load(clip, adapter)
        try:
            with vl.merged(clip):
                return self.experiment.score().accuracy()
        finally:
            vl.eject(clip)


def run(config: GenerateConfig) -> dict[str, Any]:
    """Carry out a run and return what is written to its result.json."""
    with threads(1 if config.backbone == TINY else None):
        tasks = [_task(config, name) for name in config.tasks]
        for task in tasks:
            count = len(task.experiment.dataset.test)
            print_note(f"{task.name}: zero-shot {task.zero_shot:.1f} % of {count} images")
        supports = {seed: [_supports(config, task, seed) for task in tasks] for seed in config.seed}
        directory = RunDirectory(config.output, overwrite=config.overwrite)
        directory.write_config(config)
        seeds = []
        for seed in config.seed:
            seeds.append(_run_seed(config, tasks, supports[seed], seed, directory))
            for task, row in zip(tasks, seeds[-1], strict=True):
                print_note(
                    f"seed {seed}, {task.name}: "
                    + ", ".join(f"{key} {value:.1f} %" for key, value in row.items())
                )
    rows = [_row(config, task, [seed[index] for seed in seeds]) for index, task in enumerate(tasks)]
    result = directory.write_result({"task": "generate", "method": "icm-lora", "tasks": rows})
    if config.record:
        write_text_atomically(config.record, "".join(f"{json.dumps(row)}\n" for row in rows))
    _print(config, rows, directory.path)
    return result


def classes_of(task: str) -> tuple[str, list[int] | None]:
    """Split `digits@0-3,7` into the data set and the labels, None for all of them."""
    name, at, text = task.rpartition("@")
    if not at:
        return task, None
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ConfigError(f"task {task!r} does not end in classes such as @0-3 or @1,4-6")
    labels: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        labels += range(int(first), int(last or first) + 1)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"task {task!r} needs at least two different classes")
    return name, labels


def only_classes(dataset: Dataset, labels: Sequence[int]) -> Dataset:
    """Return the data set with some classes only, relabelled from 0 in the order given."""
    count = len(dataset.classes)
    if wrong := [label for label in labels if label >= count]:
        raise ConfigError(f"{dataset.name} has classes 0-{count - 1}, not {wrong[0]}")
    new = {label: index for index, label in enumerate(labels)}

    def kept(items: Sequence[Item]) -> list[Item]:
        return [replace(item, label=new[item.label]) for item in items if item.label in new]

    return replace(
        dataset,
        classes=tuple(dataset.classes[label] for label in labels),
        train=kept(dataset.train),
        val=kept(dataset.val),
        test=kept(dataset.test),
    )


def _task(config: GenerateConfig, name: str) -> Task:
    dataset, labels = classes_of(name)
    experiment = prepare(
        FewshotConfig(
            backbone=config.backbone,
            pretrained=config.pretrained,
            dataset=dataset,
            root=config.root,
            shots=config.shots,
            method="lora",
            adapter=config.adapter,
            lr=config.lr,
            steps=config.steps,
            checkpoint_every=0,
            device=config.device,
            test_on=config.test_on,
        )
    )
    if labels is not None:
        chosen = only_classes(experiment.dataset, labels)
        experiment = replace(
            experiment,
            dataset=chosen,
            tokens=experiment.tokens[:, labels],
            test=TestImages(chosen.test, experiment.backbone.transform),
        )
    _recorder(config, experiment, Path())  # refuses impossible numbers before anything is trained
    return Task(name, experiment, experiment.score().accuracy())


def _recorder(config: GenerateConfig, experiment: Experiment, folder: Path) -> SnapshotRecorder:
    assert experiment.config.steps is not None
    return SnapshotRecorder(
        experiment.backbone.clip,
        folder,
        steps=experiment.config.steps,
        last=config.snapshot_steps,
        every=config.snapshot_every,
    )


def _supports(config: GenerateConfig, task: Task, seed: int) -> tuple[Shots, Shots]:
    """Return two sets of support images: those trained on, and others that are not."""
    experiment = task.experiment
    data, transform = experiment.dataset, experiment.backbone.transform
    trained, _ = few_shot(data.train, data.val, config.shots, seed)
    taken = {id(item) for item in trained}
    rest = replace(data, train=[item for item in data.train if id(item) not in taken])
    return (
        load_shots(data, config.shots, seed, transform, "none"),
        load_shots(rest, config.shots, SUPPORT_SEED + seed, transform, "none"),
    )


def _run_seed(
    config: GenerateConfig,
    tasks: Sequence[Task],
    supports: Sequence[tuple[Shots, Shots]],
    seed: int,
    directory: RunDirectory,
) -> list[dict[str, float]]:
    """Return the accuracies of every task."""
    run = directory.child(f"seed_{seed}")
    snapshots = [
        _train(config, task, seen, seed, run.child(f"task_{index}"))
        for index, (task, (seen, _)) in enumerate(zip(tasks, supports, strict=True))
    ]
    settings = replace(config.generator, seed=seed)
    made = train_generator(snapshots, settings, run.child("generator"), device=config.device)
    file = made.save(run.path / "generator.safetensors")
    generator = Generator.load(file)
    adapters = [
        generator.write(
            run.path / f"task_{index}" / "generated.safetensors", task.vector(other), seed=seed
        )
        for index, (task, (_, other)) in enumerate(zip(tasks, supports, strict=True))
    ]
    rows = []
    for index, task in enumerate(tasks):
        found = [task.accuracy(adapter) for adapter in adapters]
        rows.append(
            {
                "trained": task.accuracy(snapshots[index].files[-1]),
                "generated": found[index],
                "of_other_tasks": float(np.mean(found[:index] + found[index + 1 :])),
            }
        )
    return rows


def _train(
    config: GenerateConfig, task: Task, shots: Shots, seed: int, run: RunDirectory
) -> TaskSnapshots:
    """Train one adapter and record its last states."""
    experiment = task.experiment
    clip = experiment.backbone.clip
    recorder = _recorder(config, experiment, run.path / "snapshots")
    vector = task.vector(shots)
    experiment.inject(seed)
    try:
        adapt(experiment, seed, shots, run, [recorder])
    finally:
        vl.eject(clip)
    return TaskSnapshots(task.name, vector, recorder.files)


def _row(config: GenerateConfig, task: Task, seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return one line of the closing table."""
    name, at, labels = task.name.rpartition("@")
    row: dict[str, Any] = {
        "task": f"{Path(name.removeprefix('folder:')).name}{at}{labels}",
        "classes": len(task.experiment.dataset.classes),
        "test_images": len(task.experiment.dataset.test),
        "test_on": config.test_on,
        "seeds": list(config.seed),
        "zero_shot": round(task.zero_shot, 2),
    }
    for key in seeds[0]:
        values = [seed[key] for seed in seeds]
        row[key] = round(float(np.mean(values)), 2)
        row[f"{key}_std"] = round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else 0.0
        row[f"{key}_seeds"] = [round(value, 2) for value in values]
    row["generator"] = asdict(config.generator)
    return row


def _print(config: GenerateConfig, rows: Sequence[dict[str, Any]], path: Path) -> None:
    table = Table(
        title=f"Generated adapters: {config.backbone}, {config.shots} shots, accuracy in % "
        f"({config.test_on} images)",
        title_justify="left",
    )
    for title in ("task", "zero-shot", "trained LoRA", "generated", "gain", "others' generated"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for row in rows:
        table.add_row(
            row["task"],
            f"{row['zero_shot']:.1f}",
            *(f"{row[key]:.1f} ± {row[f'{key}_std']:.1f}" for key in ("trained", "generated")),
            f"{row['generated'] - row['zero_shot']:+.1f}",
            f"{row['of_other_tasks']:.1f} ± {row['of_other_tasks_std']:.1f}",
        )
    console = Console(width=PLAIN_WIDTH, highlight=False)
    console.print(table)
    console.print(f"result: {path / 'result.json'}", soft_wrap=True)
