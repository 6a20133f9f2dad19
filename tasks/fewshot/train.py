"""One few-shot run: zero-shot, then train, evaluate and save an adapter for every seed."""

import json
import time
from typing import Any

import numpy as np

import visionlora as vl
from tasks.fewshot.adapt import adapt
from tasks.fewshot.adapter_files import Description, save_adapter
from tasks.fewshot.backbones import TINY
from tasks.fewshot.config import RUNS, FewshotConfig
from tasks.fewshot.evaluate import Scores, merged_for
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.frozen import measure, test_features
from tasks.fewshot.pictures import save_confusion
from tasks.fewshot.rate_search import check_search, with_searched_rate
from tasks.fewshot.report import COLUMNS, print_note, print_result
from tasks.fewshot.results import read_matrix, summarise, write_matrix
from tasks.fewshot.sampling import short_classes
from tasks.fewshot.shots import Shots
from visionlora.training import RunDirectory
from visionlora.training.device import threads
from visionlora.training.output import open_run, taken_back_on_error

MAY_CHANGE = ("output", "resume", "overwrite", "device", "seed", "checkpoint_every")
"""Settings that may differ when a run is resumed; seeds may be added."""


def run(config: FewshotConfig) -> dict[str, Any]:
    """Carry out a run and return what is written to its result.json.

    Raises:
        VisionLoraError: a setting, an image or a file that cannot be used.
    """
    # The tiny model's operations are too small for several threads, which only wait for each
    # other; on a busy machine that costs ten times the work.
    with threads(1 if config.backbone == TINY else None):
        return _run(config)


def _run(config: FewshotConfig) -> dict[str, Any]:
    began = time.monotonic()
    experiment = prepare(config)
    config = experiment.config
    directory, made = open_run(
        config.output, RUNS / config.run_name, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        first = experiment.shots(config.seed[0])
        check_search(experiment, first)
        zero: dict[str, float] = {}
        if experiment.backbone.has_text:
            zero = experiment.figures(experiment.score())
        else:
            test_features(experiment, experiment.classifier())
        directory.write_config(config, volatile=MAY_CHANGE)
    _announce(experiment, zero, directory)
    before = time.monotonic() - began
    experiment = with_searched_rate(experiment, directory, first)
    seeds = [
        run_seed(experiment, seed, directory.child(f"seed_{seed}"), first if not index else None)
        for index, seed in enumerate(config.seed)
    ]
    result = finish(experiment, directory, zero, seeds, before)
    if directory.main:
        print_result(result, directory.path)
    return result


def finish(
    experiment: Experiment,
    directory: RunDirectory,
    zero: dict[str, float],
    seeds: list[dict[str, Any]],
    before: float,
) -> dict[str, Any]:
    """Write result.json and confusion.png of a run whose seeds are done, and return the former.

    Args:
        experiment: What the seeds share.
        directory: The run's folder.
        zero: Figures before training.
        seeds: What `run_seed` returned.
        before: Seconds spent before the first seed.
    """
    config = experiment.config
    result = summarise(experiment, zero, seeds, before)
    if directory.main:
        files = [directory.path / f"seed_{item['seed']}" / "confusion.csv" for item in seeds]
        save_confusion(
            np.sum([read_matrix(file) for file in files], axis=0),
            experiment.dataset.classes,
            f"{config.dataset}, {config.method}, {config.shots} shots: {result['accuracy']:.1f} %",
            directory.path / "confusion.png",
        )
    return directory.write_result(result)


def run_seed(
    experiment: Experiment, seed: int, directory: RunDirectory, shots: Shots | None
) -> dict[str, Any]:
    """Train, evaluate and save one seed; a seed that is finished is only read."""
    done = directory.path / "result.json"
    if directory.resume and done.is_file():
        result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return result
    config, clip = experiment.config, experiment.backbone.clip
    shots = shots or experiment.shots(seed)
    baselines = measure(experiment, seed, shots)
    experiment.inject(seed)
    try:
        fitted, trainable = adapt(experiment, seed, shots, directory)
        with merged_for(clip, config.recipe.method):
            scores = experiment.score()
        figures = experiment.figures(scores)
        if directory.main:
            save_adapter(directory.path, clip, describe(experiment))
            write_matrix(scores.confusion(), experiment.dataset.classes, directory.path)
    finally:
        vl.eject(clip)
    return directory.write_result(
        {
            "seed": seed,
            "shots": config.shots,
            **{key: round(value, 4) for key, value in figures.items()},
            "baselines": baselines,
            "per_class": _per_class(experiment, scores),
            "train_loss": fitted.loss,
            "steps": fitted.steps,
            "trainable_parameters": trainable,
            "step_seconds": fitted.step_seconds,
            "skipped_train_images": len(shots.skipped),
        }
    )


def describe(experiment: Experiment) -> Description:
    """Return what an adapter of this experiment needs besides its tensors."""
    config, backbone = experiment.config, experiment.backbone
    return Description(
        backbone=config.backbone,
        pretrained=config.pretrained,
        classes=list(experiment.dataset.classes),
        templates=list(config.template or ()),
        transform=backbone.transform.to_dict(),
        method=config.method,
        dataset=config.dataset,
        random_weights=backbone.random_weights,
        head=config.head,
        image_size=config.image_size,
    )


def _per_class(experiment: Experiment, scores: Scores) -> dict[str, float | None]:
    return {
        name: None if value is None else round(value, 2)
        for name, value in zip(experiment.dataset.classes, scores.per_class(), strict=True)
    }


def _announce(experiment: Experiment, zero: dict[str, float], directory: RunDirectory) -> None:
    """Say what was found in the data, and the zero-shot accuracy, before training starts."""
    if not directory.main:
        return
    config, dataset = experiment.config, experiment.dataset
    if experiment.backbone.random_weights:
        print_note("random weights: accuracies mean nothing, only timings do")
    if dataset.split == "own":
        print_note(f"own split of {dataset.name}: not comparable with published figures")
    if short := short_classes(dataset.train, config.shots):
        label, count = min(short.items(), key=lambda pair: pair[1])
        what = "all are used" if config.short_class == "keep" else "some are repeated"
        print_note(
            f"{len(short)} of {len(dataset.classes)} classes have fewer than {config.shots} "
            f"training images ({dataset.classes[label]!r} has {count}): {what}"
        )
    if skipped := experiment.test.skipped:
        print_note(f"{len(skipped)} unreadable test images left out, first: {skipped[0]}")
    figures = ", ".join(f"{COLUMNS[key]} {value:.1f} %" for key, value in zero.items())
    count = len(dataset.test) - len(experiment.test.skipped)
    images = f"{count} test images of {len(dataset.classes)} classes"
    print_note(f"zero-shot on {images}: {figures}" if zero else f"{images}, no zero-shot")
