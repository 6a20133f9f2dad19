"""What was trained on one data set, tested on others: their own classes, prompts and images."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import visionlora as vl
from tasks.fewshot.adapter_files import TENSORS
from tasks.fewshot.datasets import Dataset, limited
from tasks.fewshot.evaluate import TestImages, merged_for
from tasks.fewshot.experiment import RANDOM_TEST_IMAGES, Experiment
from tasks.fewshot.protocol.config import Cell, ProtocolConfig, path_name
from tasks.fewshot.report import print_note
from tasks.fewshot.templates import read_templates
from tasks.fewshot.text import tokenize
from visionlora.errors import DataError, nearest
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory


def as_target(config: ProtocolConfig, source: Experiment, dataset: Dataset) -> Experiment:
    """Return an experiment that tests on `dataset` with the backbone of `source`.

    Raises:
        VisionLoraError: a prompt that is too long, or, for another domain, a foreign class.
    """
    if config.name == "domain-generalisation":
        known = set(source.dataset.classes)
        if foreign := [name for name in dataset.classes if name not in known]:
            raise DataError(
                f"class {foreign[0]!r} of {dataset.name} is no class of {source.dataset.name}"
                f"{nearest(foreign[0], known)}; other classes belong to cross-dataset"
            )
    limit = config.limit_test or (RANDOM_TEST_IMAGES if source.backbone.random_weights else None)
    if limit is not None:
        dataset = limited(dataset, limit)
    templates = read_templates(config.template or dataset.templates)
    return replace(
        source,
        config=replace(source.config, dataset=dataset.name, template=templates),
        dataset=dataset,
        tokens=tokenize(dataset.classes, templates, source.backbone.tokenizer),
        test=TestImages(dataset.test, source.backbone.transform),
        frozen=[],
    )


def zero_shot(target: Experiment, directory: RunDirectory) -> dict[str, float]:
    """Return the figures of the backbone alone on a target, computed once."""
    file = directory.path / "targets" / path_name(target.dataset.name) / "zero-shot.json"
    return _kept(target, file, directory.main)


def tested(
    target: Experiment, cells: Sequence[Cell], directory: RunDirectory
) -> Iterator[tuple[Cell, int, dict[str, float]]]:
    """Yield the figures of every adapter, by cell and seed, on a target, each computed once."""
    clip, name = target.backbone.clip, target.dataset.name
    for cell in cells:
        for seed in target.config.seed:
            folder = directory.path / cell.path / f"seed_{seed}"
            file = folder / f"on-{path_name(name)}.json"
            if file.is_file():
                yield cell, seed, _read(file)
                continue
            vl.load(clip, folder / TENSORS)
            try:
                with merged_for(clip, cell.method):
                    figures = _kept(target, file, directory.main)
            finally:
                vl.eject(clip)
            if directory.main:
                print_note(f"{cell}, seed {seed} on {name}: {figures['accuracy']:.1f} %")
            yield cell, seed, figures


def _kept(target: Experiment, file: Path, main: bool) -> dict[str, float]:
    if file.is_file():
        return _read(file)
    figures = {key: round(value, 4) for key, value in target.figures(target.score()).items()}
    if main:
        write_text_atomically(file, json.dumps(figures, indent=2) + "\n")
    return figures


def _read(file: Path) -> dict[str, float]:
    try:
        figures: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged; remove it, and it will be measured again") from error
    return figures
