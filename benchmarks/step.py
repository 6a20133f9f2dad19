"""Measure one training step of every method beside PEFT and beside the floor.

python benchmarks/step.py [--methods lora dora ...] [--json FILE]      see --help and README.md
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

import visionlora as vl
from visionlora.errors import ConfigError, OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training.cli import run_cli

if TYPE_CHECKING:
    from benchmarks.measure import Result


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, print the table, write the JSON lines."""
    options = parse_arguments(argv)
    check_json(options.json)
    for method in options.methods if options.methods != ["all"] else ():
        vl.get_method(method)
    with bench_extra():  # here, so that --help and an unknown method need neither timm nor PEFT
        from benchmarks import rounds
    torch.manual_seed(0)
    plan = rounds.prepare(options.model, options.depth, options.methods, options.rank)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    results = []
    with Console(stderr=True).status("measuring the floor and full fine-tuning") as status:
        for result in rounds.measured(
            plan, options.batch, options.repeats, options.threads, options.minutes
        ):
            results.append(result)
            status.update(f"{len(results)} rows measured, the last is {result.contestant.method}")
    Console().print(table(results, options))
    print(f"Ratios to the floor, measured in {time.monotonic() - start:.0f} s.")
    if options.json is not None:
        lines = [json.dumps(record(result, options)) for result in results]
        write_text_atomically(options.json, "\n".join(lines) + "\n")


def table(results: list["Result"], options: argparse.Namespace) -> Table:
    """Return the results for people."""
    title = f"{options.model}, {options.depth} blocks, batch {options.batch}"
    shown = Table(title=f"{title}, {options.threads} thread(s): one training step")
    for heading in ("library", "method"):
        shown.add_column(heading)
    for heading in ("rank", "step", "forward", "saved", "seconds", "saved MB"):
        shown.add_column(heading, justify="right")
    for result in results:
        row = result.contestant
        shown.add_row(
            row.library,
            row.method,
            "" if row.rank is None else str(row.rank),
            *(f"{x:.2f}" for x in (result.step_ratio, result.forward_ratio, result.saved_ratio)),
            f"{result.step_seconds:.3f}",
            f"{result.saved_bytes / 1e6:.1f}",
        )
    return shown


def record(result: "Result", options: argparse.Namespace) -> dict[str, Any]:
    """Return a result as one JSON line's object."""
    row = result.contestant
    return {
        "library": row.library,
        "method": row.method,
        "model": options.model,
        "rank": row.rank,
        "batch": options.batch,
        "step_ratio": round(result.step_ratio, 4),
        "forward_ratio": round(result.forward_ratio, 4),
        "saved_ratio": round(result.saved_ratio, 4),
        "depth": options.depth,
        "threads": options.threads,
        "repeats": result.repeats,
        "step_seconds": round(result.step_seconds, 4),
        "saved_bytes": result.saved_bytes,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="methods or presets, or all; default: every registered method that PEFT has too",
    )
    add_setting(parser, repeats=5, minutes=9.0)
    return parser.parse_args(argv)


def add_setting(parser: argparse.ArgumentParser, *, repeats: int, minutes: float) -> None:
    """Add the options that say what is measured with, and for how long."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one line per row")
    parser.add_argument("--rank", type=count, help="rank of every method; default: 8, for VeRA 256")
    parser.add_argument("--batch", type=count, default=8, help="images per step (8)")
    parser.add_argument("--depth", type=count, default=2, help="transformer blocks (2)")
    parser.add_argument("--repeats", type=count, default=repeats, help=f"timed rounds ({repeats})")
    parser.add_argument("--threads", type=count, default=1, help="torch threads (1)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=minutes,
        help=f"begin no further round after this time ({minutes:g})",
    )
    parser.add_argument(
        "--model", default="vit_base_patch16_224", help="a plain vision transformer of timm"
    )


@contextmanager
def bench_extra() -> Iterator[None]:
    """Turn a package that is missing inside the block into one line that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the benchmarks need {error.name}: pip install 'visionlora[bench]'"
        ) from None


def check_json(path: Path | None) -> None:
    """Refuse an output whose folder is missing, before anything is measured."""
    if path is not None and not path.resolve().parent.is_dir():
        raise OutputError(f"cannot write {path}: its folder does not exist")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    run_cli(main)
