"""Restoration on real pairs: ways to adapt, and ways to pre-train, at equal cost.

python benchmarks/restoration.py adapt --root PAIRS                 ways to adapt one base
python benchmarks/restoration.py pretrain --root PAIRS --clean PHOTOS    what it was pre-trained on

`adapt` takes the base that ships. Every method gets the learning rate whose mean gain on the
validation pictures of both real tasks is best; then it is trained on every task with three seeds,
and measured on test pictures that no choice has seen. Tasks on clean pictures are stand-ins, marked
synthetic. `pretrain` trains a network from nothing in each mode, with the same steps and pictures,
and adapts each result to both real tasks. Lines are appended to the file as they come, so what was
stopped goes on; about three hours on one core.
"""

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.lines import each, read
from benchmarks.step import count
from tasks.restoration.training import adapt, pretrain
from tasks.restoration.training.config import AdaptConfig, PretrainConfig
from visionlora.training.cli import run_cli

FOLDER = Path(__file__).parent / "results"
RESULTS = {name: FOLDER / f"restoration_{name}.jsonl" for name in ("adapt", "pretrain")}
SEEDS = (0, 1, 2)
BUDGET, STEPS = 0.1, 300
FACTORS = (5e-4, 1.5e-3, 5e-3)
RATES = {
    "colora": FACTORS,
    "lora": FACTORS,
    "full": (2e-4, 6e-4, 2e-3),
    "decoder": (2e-4, 6e-4, 2e-3),
    "bias": (1.5e-3, 5e-3, 1.5e-2),
    "scratch": (6e-4, 2e-3, 6e-3),
}
MODES = ("prod", "single", "fixed")
PRETRAIN_STEPS = 1500


@dataclass(frozen=True)
class Task:
    """What is adapted to, and how many of its pictures are for what."""

    data: str
    """With the root of all pairs to be filled in."""
    kind: str
    train: int
    validation: int
    test: int
    real: bool = True


TASKS = {
    "PolyU": Task("{}/PolyU", "denoise", 16, 4, 12),
    "CC15": Task("{}/CC15", "denoise", 4, 1, 3),
    "rain": Task("derain:{}/CBSD68", "derain", 8, 3, 6, real=False),
    "haze": Task("dehaze:{}/CBSD68", "dehaze", 8, 3, 6, real=False),
}
REAL = [name for name, task in TASKS.items() if task.real]
KEPT = (
    *("trainable_parameters", "trainable_percent", "adapter_bytes", "lr", "steps", "seconds"),
    *("val_psnr", "val_psnr_input", "val_psnr_base", "test_psnr", "test_ssim"),
    *("test_psnr_input", "test_psnr_base"),
)


def main() -> None:
    """Carry out what the command line asks for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    path = options.json or RESULTS[options.part]
    scratch = path.with_suffix("")
    if options.part == "adapt":
        adapt_all(path, options, scratch)
    else:
        pretrain_all(path, options, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def adapt_all(path: Path, options: argparse.Namespace, scratch: Path) -> None:
    """Choose rates on validation pictures, then measure all methods on test pictures."""
    trials = {
        f"{method}, {task}, rate {rate:g}": (method, task, rate)
        for method in options.methods
        for task in REAL
        for rate in RATES[method]
    }

    def trial(name: str) -> dict[str, Any]:
        method, task, rate = trials[name]
        found = adapted(options, scratch, task, method, rate, SEEDS[0])
        kept = {key: value for key, value in found.items() if not key.startswith("test")}
        return {"method": name, "trial": method, "data": task, **kept}

    each(list(trials), path, trial)
    finals = {
        f"{method}, {task}, seed {seed}": (method, task, seed)
        for task in options.tasks
        for method in options.methods
        for seed in SEEDS
    }

    def final(name: str) -> dict[str, Any]:
        method, task, seed = finals[name]
        rate = best_rate(path, method)
        found = adapted(options, scratch, task, method, rate, seed)
        return {"method": name, "adapted": method, "data": task, "seed": seed, **found}

    each(list(finals), path, final)


def best_rate(path: Path, method: str) -> float:
    """Return the rate with the best mean gain on the validation pictures of the real tasks."""
    gains: dict[float, float] = {}
    for line in read(path):
        if line.get("trial") == method:
            gain = line["val_psnr"] - line["val_psnr_input"]
            gains[line["lr"]] = gains.get(line["lr"], 0.0) + gain
    return max(gains, key=lambda rate: gains[rate])


def pretrain_all(path: Path, options: argparse.Namespace, scratch: Path) -> None:
    """Pre-train in every mode, and adapt each result to the real tasks."""
    runs = {f"{mode}, seed {seed}": (mode, seed) for seed in SEEDS for mode in options.modes}

    def measure(name: str) -> dict[str, Any]:
        mode, seed = runs[name]
        folder = scratch / f"{mode}-{seed}"
        config = PretrainConfig(
            clean=[str(options.clean)],
            mode=mode,
            steps=PRETRAIN_STEPS,
            seed=seed,
            output=str(folder),
            resume=folder.exists(),
        )
        line = {
            "method": name,
            "mode": mode,
            "seed": seed,
            "pretrain": pretrain.run(config)["loss"],
        }
        base = str(folder / pretrain.BASE)
        for task in REAL:
            for method, rate in (("full", 6e-4), ("colora", 1.5e-3)):
                found = adapted(options, scratch, task, method, rate, seed, base)
                line |= {f"{task} alone": found["test_psnr_base"]}
                line |= {f"{task} {method}": found["test_psnr"]}
        return line

    each(list(runs), path, measure)


def adapted(
    options: argparse.Namespace,
    scratch: Path,
    task: str,
    method: str,
    rate: float,
    seed: int,
    base: str = "tiny",
) -> dict[str, Any]:
    """Adapt once and return the figures."""
    chosen = TASKS[task]
    config = AdaptConfig(
        base=base,
        data=chosen.data.format(options.root),
        task=chosen.kind,
        method=method,
        train_images=chosen.train,
        val_images=chosen.validation,
        test_images=chosen.test,
        steps=STEPS,
        budget=BUDGET,
        lr=rate,
        seed=seed,
        checkpoint_every=0,
        output=str(scratch / f"{method}-{task}"),
        overwrite=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result: Mapping[str, Any] = adapt.run(config, say=lambda _: None)
    return {key: result[key] for key in KEPT}


def parse_arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(RESULTS))
    parser.add_argument("--root", required=True, help="folder with PolyU, CC15 and CBSD68")
    parser.add_argument("--clean", type=Path, help="photographs to pre-train on")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--json", type=Path, help="another file of results")
    options = parser.parse_args()
    if options.part == "pretrain" and options.clean is None:
        parser.error("pretrain needs --clean PHOTOS")
    return options


if __name__ == "__main__":
    run_cli(main)
