"""Train every registered method on the embedded few-shot task, beside its step time and its size.

python benchmarks/methods.py --choose     choose a learning rate per method on validation images
python benchmarks/methods.py              train with these, three seeds each, and test
Both append to a file of JSON lines as they go, so an interrupted run continues where it was. With
`--presets` they are for the methods with an initialiser or dynamics, beside LoRA.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import visionlora as vl
from benchmarks.climb import FACTOR, climb
from benchmarks.lines import each, read
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.recipe import PRESETS, RATES
from tasks.fewshot.train import run_seed
from visionlora.errors import ConfigError, VisionLoraError
from visionlora.io.atomic import write_text_atomically
from visionlora.registry import list_presets
from visionlora.training import RunDirectory
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results"
MOST_TRIALS = 7
REFERENCES = ("lora", "lora(dropout=0.0)", "full", "lora-fa", "lora-xs", "slora", "spiel")
"""What presets are beside; some of them ask for LoRA's dropout to be left out."""


def main(argv: list[str] | None = None) -> None:
    """Carry out what the command line asks for."""
    options = parse_arguments(argv)
    torch.set_num_threads(1)
    usual = preset_names() if options.presets else vl.list_methods()
    if options.presets and options.choose:  # methods alone have their rates
        usual = [name for name in usual if name not in vl.list_methods()]
    names = options.methods or usual
    for name in names:
        vl.parse(name)
    (choose if options.choose else test)(names, options)


def preset_names() -> list[str]:
    """Return all presets with an initialiser or dynamics, after what they are compared with."""
    return [*REFERENCES, *(item.name for item in list_presets() if item.factors)]


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
            "accuracies": [round(value, 2) for value in accuracies],
            "std": round(statistics.stdev(accuracies), 2) if len(accuracies) > 1 else None,
            "seeds": seeds,
            "steps": options.steps,
            "lr": runs[0]["lr"],
            "parameters": runs[0]["trainable_parameters"],
            "file_bytes": runs[0]["file_bytes"],
            "losses": [run["losses"] for run in runs],
        }

    file = "presets.jsonl" if options.presets else "methods.jsonl"
    each(names, options.json or RESULTS / file, measure)


def choose(names: list[str], options: argparse.Namespace) -> None:
    """Climb over learning rates on validation images, and store the multiple of the recipe's."""
    lr = PRESETS["tiny"].lr
    seeds = options.seed or [1]
    base = FewshotConfig(seed=seeds, steps=options.steps, checkpoint_every=0, test_on="val", lr=lr)
    experiment = prepare(base)
    stored: dict[str, float] = json.loads(RATES.read_text(encoding="utf-8"))

    def measure(name: str) -> dict[str, Any]:
        def accuracy(step: int) -> float:
            try:
                runs = [train(experiment, name, lr * FACTOR**step, seed) for seed in seeds]
            except VisionLoraError:  # diverged
                return 0.0
            return statistics.mean(run["accuracy"] for run in runs)

        start = stored.get(name) or stored.get(vl.parse(name).method, 1.0)
        # A rate found before is a start.
        best, found = climb(accuracy, round(math.log(start, FACTOR)), MOST_TRIALS)
        tried = {f"{lr * FACTOR**step:.2g}": found[step] for step in sorted(found)}
        # A seed or two are noisy: of rates within a point of the best, the smallest is safest.
        gentle = min(step for step, value in found.items() if value >= found[best] - 1.0)
        rate = round(FACTOR**gentle, 4)
        return {"method": name, "rate": rate, "seeds": seeds, "validation": tried}

    file = "preset_rates.jsonl" if options.presets else "rates.jsonl"
    path = options.json or RESULTS / file
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
        directory = RunDirectory(Path(folder) / "run")
        with contextlib.redirect_stderr(io.StringIO()):  # the bars of a hundred short runs
            result = run_seed(chosen, seed, directory, None)
        size = sum(item.stat().st_size for item in directory.path.glob("*.safetensors"))
        log = list(read(directory.path / "log.jsonl"))
    losses = {line["step"]: round(line["loss"], 4) for line in log}
    return {**result, "lr": config.lr, "file_bytes": size, "losses": losses}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--choose", action="store_true", help="choose learning rates instead")
    parser.add_argument("--presets", action="store_true", help="all presets instead of methods")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seed", type=int, nargs="+", help="1 2 3, to choose a rate 1")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of a run (100)")
    parser.add_argument("--json", type=Path, help="where the lines go")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    run_cli(main)
