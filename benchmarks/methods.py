"""Train every registered method on the embedded few-shot task, beside its step time and its size.

python benchmarks/methods.py --choose     choose a learning rate per method on validation images
python benchmarks/methods.py              train with these, three seeds each, and test
Both append to a file of JSON lines as they go, so an interrupted run continues where it was.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import visionlora as vl
from tasks.fewshot.config import PRESETS, RATES, FewshotConfig
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.train import run_seed
from visionlora.errors import ConfigError, VisionLoraError
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results"
FACTOR = 3.0
"""Neighbouring learning rates of the search."""
MOST_TRIALS = 7


def main(argv: list[str] | None = None) -> None:
    """Carry out what the command line asks for."""
    options = parse_arguments(argv)
    torch.set_num_threads(1)
    names = options.methods or vl.list_methods()
    for name in names:
        vl.get_method(name)
    (choose if options.choose else test)(names, options)


def test(names: list[str], options: argparse.Namespace) -> None:
    """Measure test accuracy over the seeds, trained scalars, and bytes of the adapter file."""
    seeds = options.seed or [1, 2, 3]
    base = FewshotConfig(seed=seeds, steps=options.steps, checkpoint_every=0)
    experiment = prepare(base)
    zero = experiment.figures(experiment.score())["accuracy"]

    def measure(name: str) -> dict[str, Any]:
        runs = [train(experiment, name, None, seed) for seed in seeds]
        accuracies = [run["accuracy"] for run in runs]
        return {
            "method": name,
            "zero_shot": round(zero, 2),
            "accuracy": round(statistics.mean(accuracies), 2),
            "std": round(statistics.stdev(accuracies), 2) if len(accuracies) > 1 else None,
            "seeds": seeds,
            "steps": options.steps,
            "lr": runs[0]["lr"],
            "parameters": runs[0]["trainable_parameters"],
            "file_bytes": runs[0]["file_bytes"],
        }

    each(names, options.json or RESULTS / "methods.jsonl", measure)


def choose(names: list[str], options: argparse.Namespace) -> None:
    """Climb over learning rates on validation images, and store the multiple of the recipe's."""
    lr = PRESETS["tiny"].lr
    seeds = options.seed or [1]
    base = FewshotConfig(seed=seeds, steps=options.steps, checkpoint_every=0, test_on="val", lr=lr)
    experiment = prepare(base)
    stored: dict[str, float] = json.loads(RATES.read_text(encoding="utf-8"))

    def measure(name: str) -> dict[str, Any]:
        found: dict[int, float] = {}

        def accuracy(step: int) -> float:
            if step not in found:
                try:
                    runs = [train(experiment, name, lr * FACTOR**step, seed) for seed in seeds]
                    found[step] = statistics.mean(run["accuracy"] for run in runs)
                except VisionLoraError:  # diverged
                    found[step] = 0.0
            return found[step]

        best = round(math.log(stored.get(name, 1.0), FACTOR))  # a rate found before is a start
        while len(found) < MOST_TRIALS:
            around = max((best - 1, best, best + 1), key=accuracy)
            if around == best:
                break
            best = around
        tried = {f"{lr * FACTOR**step:.2g}": found[step] for step in sorted(found)}
        # A seed or two are noisy: of rates within a point of the best, the smallest is safest.
        gentle = min(step for step, value in found.items() if value >= found[best] - 1.0)
        rate = round(FACTOR**gentle, 4)
        return {"method": name, "rate": rate, "seeds": seeds, "validation": tried}

    path = options.json or RESULTS / "rates.jsonl"
    each(names, path, measure)
    rates = {item["method"]: item["rate"] for item in read(path)}
    write_text_atomically(
        RATES, json.dumps(dict(sorted({**stored, **rates}.items())), indent=2) + "\n"
    )


def train(experiment: Experiment, name: str, lr: float | None, seed: int) -> dict[str, Any]:
    """Train one method for one seed, and return its result with the size of its file."""
    config = dataclasses.replace(
        experiment.config, method=name, adapter={}, lr=lr, seed=[seed]
    ).resolved(tuple(experiment.config.template or ()))
    chosen = dataclasses.replace(experiment, config=config)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / name)
        with contextlib.redirect_stderr(io.StringIO()):  # the bars of a hundred short runs
            result = run_seed(chosen, seed, directory, None)
        size = sum(item.stat().st_size for item in directory.path.glob("*.safetensors"))
    return {**result, "lr": config.lr, "file_bytes": size}


def each(names: list[str], path: Path, measure: Callable[[str], dict[str, Any]]) -> None:
    """Measure the methods that are not in the file yet, and append each as it is done."""
    done = {item["method"] for item in read(path)}
    waiting = [name for name in names if name not in done]
    start = time.monotonic()
    for index, name in enumerate(waiting):
        item = measure(name)
        lines = [json.dumps(line) for line in [*read(path), item]]
        write_text_atomically(path, "\n".join(lines) + "\n")
        left = (time.monotonic() - start) / (index + 1) * (len(waiting) - index - 1)
        print(
            f"{json.dumps(item)}   {index + 1}/{len(waiting)}, {left / 60:.0f} min left", flush=True
        )
    print(f"{len(waiting)} methods measured, {len(done)} were there; all in {path}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Return the lines of a results file, none if it does not exist."""
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--choose", action="store_true", help="choose learning rates instead")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all registered")
    parser.add_argument("--seed", type=int, nargs="+", help="1 2 3, to choose a rate 1")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of a run (100)")
    parser.add_argument("--json", type=Path, help="where the lines go")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    run_cli(main)
