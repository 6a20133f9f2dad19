"""Steps to a given loss on the planted teacher, for every preset and what it is compared with.

python benchmarks/planted.py                 about eight minutes on one thread
python benchmarks/planted.py --methods lora pissa "block-lora+lora-ga+glad"

Every product has its own learning rate, chosen on other seeds than those of the table. Lines are
appended to `results/planted.jsonl` as they come, so an interrupted run continues where it was.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import visionlora as vl
from benchmarks.climb import FACTOR, climb
from benchmarks.lines import each
from benchmarks.teacher import Curve, Problem, train
from visionlora.errors import ConfigError
from visionlora.registry import list_presets
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results" / "planted.jsonl"
TARGETS = (0.05, 0.01)
"""Losses to be reached, as fractions of that of the base."""
STEPS = 200
SEEDS, VALIDATION_SEEDS = (1, 2, 3), (101, 102)
BASE_RATE, START, MOST_TRIALS = 0.01, 1, 9
"""Rates are the first times powers of `FACTOR`; the search begins at this power."""
LISA = "lisa(gamma=1)"
"""The network has two blocks, and both at once would be full fine-tuning."""
REFERENCES = (
    "lora",
    *("dora", "block-lora", "slora", "lora-fa", "lora-xs", "spiel", "full"),
    # As many scalars as LoRA of rank 4.
    *("lora-xs(rank=19)", "lora-sb(rank=19)"),
    "block-lora+lora-ga+glad",
)


def main(argv: list[str] | None = None) -> None:
    """Carry out what the command line asks for."""
    options = parse_arguments(argv)
    torch.set_num_threads(1)
    names = options.methods or default_products()
    for name in names:
        vl.parse(name)
    problems = [Problem(seed) for seed in SEEDS]
    others = [Problem(seed) for seed in VALIDATION_SEEDS]
    each(names, options.json, lambda name: measure(name, problems, others, options.steps))


def default_products() -> list[str]:
    """Return LoRA, other methods alone, all presets with an initialiser or dynamics, products."""
    composed = [item.name for item in list_presets() if item.factors]
    return [*REFERENCES, *(LISA if name == "lisa" else name for name in composed)]


def measure(
    name: str, problems: Sequence[Problem], others: Sequence[Problem], steps: int
) -> dict[str, Any]:
    """Choose a learning rate on `others` and return what it does on `problems`."""
    recipe = vl.parse(name)

    def curves(exponent: int, chosen: Sequence[Problem], until: float = 0.0) -> list[Curve]:
        lr = BASE_RATE * FACTOR**exponent
        return [train(recipe, lr, item, steps, until) for item in chosen]

    def score(exponent: int) -> tuple[float, float]:
        return _score(curves(exponent, others, until=min(TARGETS)), steps)

    best, found = climb(score, START, MOST_TRIALS)
    runs = curves(best, problems)
    return {
        "method": name,
        "factors": recipe.factors,
        "lr": float(f"{BASE_RATE * FACTOR**best:.3g}"),
        "seeds": [item.seed for item in problems],
        "steps": steps,
        "parameters": runs[0].parameters,
        "steps_to": {str(target): [run.steps_to(target) for run in runs] for target in TARGETS},
        "final": [float(f"{run.final:.3g}") for run in runs],
        "tried": {f"{BASE_RATE * FACTOR**step:.3g}": -found[step][0] for step in sorted(found)},
    }


def _score(runs: Sequence[Curve], steps: int) -> tuple[float, float]:
    """Return minus the mean of the steps to all targets, twice the run for never; then the loss."""
    needed = [run.steps_to(target) or 2 * steps for run in runs for target in TARGETS]
    return -statistics.mean(needed), -statistics.mean(run.final for run in runs)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"length of a run ({STEPS})")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the lines go")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    run_cli(main)
