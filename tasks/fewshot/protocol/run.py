"""Carry out a protocol: check everything, train every cell, test, write the table.

All cells of a data set share the backbone, the decoded test images and one zero-shot pass. A cell
is an ordinary run folder; what is finished is read, what was interrupted continues from its last
checkpoint. A data set, a prompt or an option that cannot be used is refused before anything trains;
a cell that fails later (a divergence) is named at the end, and the others go on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import nan
from typing import Any

from tasks.fewshot.backbones import TINY, Backbone, load_backbone
from tasks.fewshot.datasets import Dataset
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.protocol.check import check, load_all, shortcomings
from tasks.fewshot.protocol.config import EXTENSIBLE, Cell, ProtocolConfig
from tasks.fewshot.protocol.figures import Findings, Record, headline, measured
from tasks.fewshot.protocol.progress import Progress
from tasks.fewshot.protocol.rates import (
    choose_rate,
    trials,
    validation_experiment,
)
from tasks.fewshot.protocol.transfer import as_target, tested, zero_shot
from tasks.fewshot.protocol.write import write_table
from tasks.fewshot.rate_search import with_searched_rate
from tasks.fewshot.report import COLUMNS, print_note
from tasks.fewshot.train import MAY_CHANGE, finish, run_seed
from visionlora.errors import DivergedError, VisionLoraError
from visionlora.training import RunDirectory
from visionlora.training.device import threads


@dataclass
class Bench:
    """What is shared while a protocol runs."""

    config: ProtocolConfig
    backbone: Backbone
    datasets: dict[str, Dataset]
    directory: RunDirectory
    progress: Progress
    found: Findings


def run(config: ProtocolConfig) -> dict[str, Any]:
    """Carry out a protocol and return what is written to its result.json.

    Raises:
        VisionLoraError: something that cannot be used, before any training; or cells that failed,
            after all others are done and the table is written.
    """
    with threads(1 if config.backbone == TINY else None):
        return _run(config)


def _run(config: ProtocolConfig) -> dict[str, Any]:
    backbone = load_backbone(config.backbone, config.pretrained, config.image_size)
    names = dict.fromkeys([*([config.training] if config.training else []), *config.datasets])
    datasets = load_all([name for name in names if name is not None], config)
    check(config, backbone, datasets)
    directory = RunDirectory(config.folder, resume=True)
    directory.write_config(config, volatile=EXTENSIBLE)
    found = Findings(splits={name: dataset.split for name, dataset in datasets.items()})
    bench = Bench(
        config, backbone, datasets, directory, _progress(config, datasets, directory), found
    )
    for note in shortcomings(config, datasets) if directory.main else ():
        print_note(note)
        found.notes.append(note)
    if backbone.random_weights:
        found.notes.append("Random weights: accuracies mean nothing, only timings do.")
    try:
        for name in dict.fromkeys(cell.dataset for cell in config.cells()):
            _train_all(bench, name)
    except KeyboardInterrupt:
        print_note(f"the same command continues the table in {directory.path}")
        raise
    result: dict[str, Any] = {}
    if directory.main:
        result = write_table(config, found, directory)
    if found.failed:
        first, reason = next(iter(found.failed.items()))
        raise VisionLoraError(f"{len(found.failed)} cells failed; {first}: {reason}")
    return result


def _train_all(bench: Bench, name: str) -> None:
    """Train every cell of one data set, then test what was trained on it elsewhere."""
    config, cells = bench.config, [cell for cell in bench.config.cells() if cell.dataset == name]
    dataset = bench.datasets[name]
    shared = prepare(config.cell(cells[0].method, name, cells[0].shots), dataset, bench.backbone)
    done: list[Cell] = []
    rates: dict[str, float] = {}

    @cache
    def zero() -> dict[str, float]:
        if not bench.backbone.has_text:
            return {}
        figures = shared.figures(shared.score())
        if bench.directory.main:
            print_note(f"{name}: zero-shot {_said(measured(figures))}")
        return figures

    @cache
    def validation() -> Experiment:
        return validation_experiment(config, dataset, bench.backbone)

    for cell in cells:
        try:
            changes: dict[str, Any] = {}
            if trials(config, name, cell.method):
                if cell.method not in rates:
                    rates[cell.method], note = choose_rate(
                        config, validation(), cell, bench.directory, bench.progress
                    )
                    bench.found.notes += [note] if note else []
                changes["lr"] = rates[cell.method]
            settings = config.cell(cell.method, name, cell.shots, **changes)
            settings = settings.resolved(dataset.templates)
            settings = replace(settings, params=shared.config.params)
            experiment = replace(shared, config=settings)
            _train_cell(bench, experiment, cell, zero)
            done.append(cell)
        except DivergedError as error:
            bench.found.failed[str(cell)] = str(error)
            for seed in config.seed:
                bench.progress.drop((f"{cell}, seed {seed}", cell.method))
            print_note(f"{cell}: {error}")
    if config.transfers:
        _transfer(bench, shared, done)


def _train_cell(
    bench: Bench, experiment: Experiment, cell: Cell, zero: Callable[[], dict[str, float]]
) -> None:
    """Train the seeds of a cell that are missing, and add the figures of all to the table."""
    directory = bench.directory.child(cell.path)
    directory.write_config(experiment.config, volatile=MAY_CHANGE)
    before = _result(directory)
    missing = set(experiment.config.seed) - set(before["seeds"] if before else ())
    if missing:
        zero()  # said before the first figure of the data set
    experiment = with_searched_rate(experiment, directory)
    bench.found.searches += [experiment.lr_search] if experiment.lr_search else []
    seeds = []
    for seed in experiment.config.seed:
        seeds.append(run_seed(experiment, seed, directory.child(f"seed_{seed}"), None))
        bench.progress.done((f"{cell}, seed {seed}", cell.method), _said(measured(seeds[-1])))
    if before is None or missing:
        before = finish(experiment, directory, zero(), seeds, 0.0)
    if left_out := before["skipped_images"]:
        note = f"{left_out} unreadable images of {cell.dataset} are left out."
        bench.found.notes += [] if note in bench.found.notes else [note]
    zeros = {key.removeprefix("zero_shot_"): before[key] for key in before if "zero_shot_" in key}
    if "zero_shot" in before:
        zeros["accuracy"] = before["zero_shot"]
    bench.found.zero[cell.dataset] = measured(zeros)
    for item in seeds:
        record = Record(
            cell.dataset,
            cell.method,
            cell.shots,
            int(item["seed"]),
            measured(item),
            float(before["lr"]),
            int(item["steps"]),
            int(item["trainable_parameters"]),
            experiment.dataset.split,
            "source" if bench.config.transfers else "test",
        )
        bench.found.records.append(record)
        _add_baselines(bench.found, record, item.get("baselines", {}))


def _add_baselines(found: Findings, run: Record, baselines: dict[str, dict[str, float]]) -> None:
    """Add what was measured on frozen features, which is the same beside every method."""
    there = {(item.dataset, item.method, item.shots, item.seed) for item in found.records}
    for name, figures in baselines.items():
        if (run.dataset, name, run.shots, run.seed) not in there and run.role == "test":
            found.records.append(
                replace(run, method=name, figures=measured(figures), lr=nan, steps=0, parameters=0)
            )


def _transfer(bench: Bench, source: Experiment, cells: list[Cell]) -> None:
    """Test all adapters of the source on every target, one target after the other."""
    trained = {(item.method, item.shots, item.seed): item for item in bench.found.records}
    for name in bench.config.datasets:
        target = as_target(bench.config, source, bench.datasets[name])
        bench.found.zero[name] = measured(zero_shot(target, bench.directory))
        for cell, seed, figures in tested(target, cells, bench.directory):
            bench.found.records.append(
                replace(
                    trained[cell.method, cell.shots, seed],
                    dataset=name,
                    figures=measured(figures),
                    split=target.dataset.split,
                    role="target",
                )
            )


def _progress(
    config: ProtocolConfig, datasets: dict[str, Dataset], directory: RunDirectory
) -> Progress:
    """Plan every run that is not done yet."""
    planned: dict[tuple[str, str], int] = {}
    found: set[str] = set()
    for cell in config.cells():
        settings = config.cell(cell.method, cell.dataset, cell.shots)
        steps = settings.resolved(datasets[cell.dataset].templates).steps or 1
        runs = [
            (str(trial), f"{trial.path}/seed_{trial.seed}")
            for trial in trials(config, cell.dataset, cell.method)
        ]
        runs += [(f"{cell}, seed {seed}", f"{cell.path}/seed_{seed}") for seed in config.seed]
        for name, path in runs:
            if (directory.path / path / "result.json").is_file():
                found.add(name)
            else:
                planned[name, cell.method] = steps
    return Progress(planned, len(found), enabled=directory.main)


def _result(directory: RunDirectory) -> dict[str, Any] | None:
    file = directory.path / "result.json"
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _said(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{figures[key]:.1f} %" if key == "accuracy" else f"{COLUMNS[key]} {figures[key]:.1f} %"
        for key in headline(figures)
    )
