"""Measure the few-shot task beside a transcription of CLIP-LoRA's recipe: time and memory.

python benchmarks/fewshot_speed.py [--batch 16] [--classes 50] [--json FILE]      see --help

One optimisation step and one evaluation pass of a CLIP model with random weights: rank 2 on q, k
and v of both towers, dropout 0.25, in float32 on the CPU, the same images and prompts for both.
The other side is `reference_recipe.py`. 16 images and 50 classes are half of a usual step of the
recipe, so that it fits into 12 GB.

Times are taken in turns in one process, each ratio inside one round, and the median is shown; with
one thread it is CPU time, which other programs disturb least, otherwise wall time. Peak
memory is the peak of resident memory of a fresh process per side that does two steps and nothing
else, with python, torch and the weights in it: what a machine must have.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import visionlora as vl
from benchmarks.turns import clock_for, in_turns, median_ratio
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError, OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training.cli import run_cli

OPTIONS: dict[str, Any] = {"rank": 2, "alpha": 1.0, "dropout": 0.25}
TEMPLATE = "a photo of a {}."
STEPS = 1000
QUALITIES = ("red", "old", "striped", "small wooden", "hand-painted", "polka dot", "rusty",
             "translucent", "very tall", "black and white")  # fmt: skip
THINGS = ("teapot", "lighthouse", "hummingbird", "sewing machine", "mountain bicycle", "umbrella",
          "grand piano", "tabby cat", "steam locomotive", "snapdragon")  # fmt: skip
GOALS = {"step": 1.5, "memory": 1 / 0.7}
"""How many times the reference's cost has to be ours, at least."""
LABELS = {
    "memory": ("peak memory of training", "MB", 0),
    "step": ("one optimisation step", "s", 2),
    "evaluation": ("one evaluation pass", "s", 2),
}
"""Words, unit and digits of the rows."""
RESULTS = Path(__file__).parent / "results" / "fewshot_speed.jsonl"


@dataclass(frozen=True)
class Setting:
    """What is measured with."""

    backbone: str
    batch: int
    classes: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One comparison; seconds, or MB."""

    what: str
    reference: float
    ours: float
    ratio: float
    """How many times the reference's cost is ours."""
    rounds: int


def class_names(count: int) -> list[str]:
    """Return different names of one to four words."""
    names = [f"{quality} {thing}" for quality in QUALITIES for thing in THINGS]
    if not 2 <= count <= len(names):
        raise ConfigError(f"--classes must be from 2 to {len(names)}, got {count}")
    return names[:: len(names) // count][:count]


class Side:
    """One of the two that are compared, with its batch."""

    def __init__(self, name: str, setting: Setting) -> None:
        from tasks.fewshot.backbones import load_backbone

        torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        pretrained = None if setting.backbone == "tiny" else "none"
        self.backbone = load_backbone(setting.backbone, pretrained)
        self.classes = class_names(setting.classes)
        size = self.backbone.transform.size
        generator = torch.Generator().manual_seed(0)
        shape = (setting.batch, 3, size, size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(setting.classes, (setting.batch,), generator=generator)
        self.step, self.evaluate = (self._ours if name == "ours" else self._reference)()

    def _ours(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        from tasks.fewshot.adapt import classification_loss
        from tasks.fewshot.classifier import Classifier, adapter_targets
        from tasks.fewshot.text import tokenize

        clip = self.backbone.clip
        targets, exclude = adapter_targets(clip, "both", ["q", "k", "v"])
        vl.inject(clip, "lora", targets, exclude=exclude, scaling="rslora", **OPTIONS)
        tokens = tokenize(self.classes, [TEMPLATE], self.backbone.tokenizer)
        model = Classifier(clip, tokens, self.backbone.transform, "both").train()
        optimizer = torch.optim.AdamW(vl.parameter_groups(clip, 2e-4, 1e-2))
        stepper = Stepper(model, optimizer)
        batch = self.images, self.labels

        def step() -> float:
            return stepper.step([batch], partial(classification_loss, model)).loss

        @torch.no_grad()
        def evaluate() -> Tensor:
            model.eval()
            with vl.merged(clip):
                logits: Tensor = model(self.images)
            model.train()
            return logits

        return step, evaluate

    def _reference(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        from benchmarks.reference_recipe import ReferenceRecipe, adapt_reference

        adapt_reference(self.backbone.clip, **OPTIONS)
        self.backbone.clip.train()
        recipe = ReferenceRecipe(
            self.backbone.clip, self.backbone.tokenizer, self.classes, TEMPLATE, STEPS
        )
        mean, std = (
            torch.tensor(value).reshape(1, 3, 1, 1)
            for value in (self.backbone.transform.mean, self.backbone.transform.std)
        )
        pixels = (self.images / 255 - mean) / std
        return partial(recipe.step, pixels, self.labels), partial(recipe.evaluate, pixels)


def peak_of_steps(name: str, setting: Setting) -> float:
    """Return the peak of resident memory in MB after two steps; for a process of its own."""
    side = Side(name, setting)
    for _ in range(2):
        side.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory(setting: Setting) -> Row:
    """Compare peak memory; to be called while this process is still small.

    A new process inherits the peak of the one that made it.
    """
    peaks = []
    for name in ("reference", "ours"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks.append(pool.submit(peak_of_steps, name, setting).result())
    reference, ours = peaks
    return Row("memory", reference, ours, reference / ours, 1)


def times(setting: Setting, rounds: int, minutes: float) -> list[Row]:
    """Compare steps and evaluation passes, in turns."""
    deadline = time.monotonic() + 60 * minutes
    sides = [Side(name, setting) for name in ("reference", "ours")]
    jobs = [getattr(side, what) for what in ("step", "evaluate") for side in sides]
    for job in jobs:  # warm up
        job()
    clock = clock_for(setting.threads)
    found = in_turns([partial(_seconds, job, clock) for job in jobs], rounds, deadline)
    return [
        Row(
            what,
            statistics.median(found[index]),
            statistics.median(found[index + 1]),
            median_ratio(found[index], found[index + 1]),
            len(found[index]),
        )
        for index, what in ((0, "step"), (2, "evaluation"))
    ]


def _seconds(job: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    job()
    return clock() - began


def table(rows: list[Row], setting: Setting) -> Table:
    """Return the results for people."""
    shown = Table(
        title=f"{setting.backbone}, random weights, {setting.batch} images, {setting.classes} "
        f"classes, {setting.threads} thread(s)"
    )
    shown.add_column("")
    for heading in ("reference", "ours", "ratio", "goal"):
        shown.add_column(heading, justify="right")
    for row in rows:
        name, unit, digits = LABELS[row.what]
        goal = GOALS.get(row.what)
        shown.add_row(
            name,
            *(f"{value:.{digits}f} {unit}" for value in (row.reference, row.ours)),
            f"{row.ratio:.2f}",
            "" if goal is None else f"{goal:.2f}",
        )
    return shown


def markdown(path: Path = RESULTS) -> str:
    """Return the stored results as a table for the docs."""
    if not path.exists():
        return "No measurement is stored: run `python benchmarks/fewshot_speed.py --json FILE`."
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = lines[0]
    rows = [
        f"| {first['backbone']}, {first['batch']} images, {first['classes']} classes, "
        f"{first['threads']} thread(s) | CLIP-LoRA's recipe | ours | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        name, unit, digits = LABELS[line["what"]]
        reference, ours = (f"{line[key]:,.{digits}f} {unit}" for key in ("reference", "ours"))
        goal = f"{GOALS[line['what']]:.2f}" if line["what"] in GOALS else ""
        rows.append(f"| {name} | {reference} | {ours} | {line['ratio']:.2f} | {goal} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, print the table, write the JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="ViT-B/16", help="ViT-B/16, tiny or another")
    parser.add_argument("--batch", type=int, default=16, help="images per step (16)")
    parser.add_argument("--classes", type=int, default=50, help="prompts per step (50)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--minutes", type=float, default=8, help="begin no further round then (8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one line per row")
    options = parser.parse_args(argv)
    for name in ("batch", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    class_names(options.classes)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise OutputError(f"cannot write {options.json}: its folder does not exist")
    setting = Setting(options.backbone, options.batch, options.classes, options.threads)
    rows = [memory(setting), *times(setting, options.rounds, options.minutes)]
    Console().print(table(rows, setting))
    if options.json is not None:
        shared = {**asdict(setting), **OPTIONS, "torch": torch.__version__}
        lines = [json.dumps({**_rounded(asdict(row)), **shared}) for row in rows]
        write_text_atomically(options.json, "\n".join(lines) + "\n")


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()
    }


if __name__ == "__main__":
    run_cli(main)
