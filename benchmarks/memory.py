"""Measure what ways of training whole weights, or entries of them, hold in memory and in a file.

python benchmarks/memory.py [--products lisa spiel ...] [--json FILE]        see --help, README.md
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

import visionlora as vl
from benchmarks.step import bench_extra, check_json, count
from visionlora.dynamics import Dynamics, StepContext
from visionlora.io.atomic import write_text_atomically
from visionlora.training.cli import run_cli

if TYPE_CHECKING:
    from benchmarks.products import Plan, Runner

PRODUCTS = (
    "full",
    "lisa(gamma=1,every=4)",
    "lisa(gamma=1,every=4,state=kept)",
    "hft",
    "spiel(every=4,observe=2)",
    "spiel(every=4,observe=2,selection=sm3)",
    "lora",
)
"""Full fine-tuning first: the others are shown beside it."""
STEPS = 18
EVERY = 4
"""Steps after which the bytes kept for backward are counted again, with what is trained then."""


@dataclass(frozen=True)
class Memory:
    """Largest number of bytes in a run, by what they are."""

    product: str
    trained: int
    """Parameters that train at some time."""
    state: int
    """What optimiser and dynamics remember between two steps."""
    gradients: int
    """Gradients of parameters when the optimiser uses them."""
    saved: int
    """What autograd keeps for backward."""
    file: int
    """The adapter file."""


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, print the table, write the JSON lines."""
    options = parse_arguments(argv)
    check_json(options.json)
    for product in options.products:
        vl.parse(product)
    with bench_extra():  # here, so that --help and an unknown name need neither timm nor PEFT
        from benchmarks import products
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    plan = products.prepare(options.model, options.depth, options.products, None)
    rows: list[Memory] = []
    with Console(stderr=True).status("measuring") as status:
        for row in measured(plan, options.batch, options.steps):
            rows.append(row)
            status.update(f"{len(rows)} of {len(plan.recipes)} measured, the last is {row.product}")
    Console().print(table(rows, options))
    if options.json is not None:
        setting = {key: getattr(options, key) for key in ("model", "depth", "batch", "steps")}
        lines = [json.dumps({**asdict(row), **setting}) for row in rows]
        write_text_atomically(options.json, "\n".join(lines) + "\n")


def measured(plan: "Plan", batch_size: int, steps: int) -> Iterator[Memory]:
    """Yield the figures of every product, one model in memory at a time."""
    from benchmarks.measure import make_batch
    from benchmarks.products import Runner

    batch = make_batch(plan.base, batch_size)
    for recipe in plan.recipes:
        yield run(recipe.text, Runner(plan.base, recipe, None, batch), steps)


def run(product: str, runner: "Runner", steps: int) -> Memory:
    """Train for some steps and return the largest of every figure."""
    from benchmarks.measure import saved_bytes
    from benchmarks.products import loss

    groups = runner.optimizer.param_groups
    trained = sum(size(item) for group in groups for item in group["params"])
    probe = Gradients()
    runner.stepper.dynamics = (probe, *runner.stepper.dynamics)
    state = saved = 0
    for step in range(steps):
        if step % EVERY == 0:
            saved = max(saved, saved_bytes(runner.model, runner.batch))
        runner.stepper.step([runner.batch], partial(loss, runner.model))
        state = max(state, runner.state_bytes())
    runner.stepper.finish()
    with tempfile.TemporaryDirectory() as folder:
        file = vl.save(runner.model, Path(folder) / "adapter.safetensors").stat().st_size
    return Memory(product, trained, state, probe.largest, saved, file)


class Gradients(Dynamics):
    """Notes the bytes of all gradients."""

    name = "gradients"

    def __init__(self) -> None:
        self.largest = 0

    def on_grads_ready(self, context: StepContext) -> None:
        """Count them."""
        held = [item.grad for item in context.model.parameters() if item.grad is not None]
        self.largest = max(self.largest, sum(map(size, held)))


def size(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def table(rows: list[Memory], options: argparse.Namespace) -> Table:
    """Return the results for people: megabytes, and the optimiser's as a share of the first row."""
    title = f"{options.model}, {options.depth} blocks, batch {options.batch}, {options.steps} steps"
    shown = Table(title=f"{title}: largest number of megabytes")
    shown.add_column("product", overflow="fold")
    for heading in ("trained", "state", "of full", "gradients", "saved", "file"):
        shown.add_column(heading, justify="right")
    for row in rows:
        figures = (row.trained, row.state, row.gradients, row.saved, row.file)
        trained, state, *others = (f"{figure / 1e6:.2f}" for figure in figures)
        ratio = f"{row.state / max(rows[0].state, 1):.1%}"
        shown.add_row(row.product, trained, state, ratio, *others)
    return shown


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--products",
        nargs="+",
        default=list(PRODUCTS),
        metavar="NAME",
        help=f"presets or products; the first is what others are beside ({' '.join(PRODUCTS)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one line per row")
    for name, value, text in (
        ("batch", 1, "images per step"),
        ("depth", 4, "transformer blocks"),
        ("steps", STEPS, "steps of each"),
        ("threads", 1, "torch threads"),
    ):
        parser.add_argument(f"--{name}", type=count, default=value, help=f"{text} ({value})")
    parser.add_argument(
        "--model", default="vit_small_patch16_224", help="a plain vision transformer of timm"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
