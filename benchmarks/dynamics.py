"""Measure whole training steps of every training dynamics beside its method alone.

python benchmarks/dynamics.py [--products glad lora-pro ...] [--json FILE]   see --help, README.md
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

import visionlora as vl
from benchmarks.step import add_setting, bench_extra, check_json
from visionlora.io.atomic import write_text_atomically
from visionlora.training.cli import run_cli

if TYPE_CHECKING:
    from benchmarks.products import Row

NOTE = (
    "A product is beside its method alone, with the same optimiser: plain LoRA for most, full "
    "fine-tuning for LISA and Half Fine-Tuning, which train whole weights. A method alone is "
    "beside plain LoRA, and so is LoRA itself, whose distance to 1 is noise. Ratios are medians: "
    "what happens once in many steps (a draw of LISA, a restart of ReLoRA) is not in them."
)


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, print the table, write the JSON lines."""
    options = parse_arguments(argv)
    check_json(options.json)
    for product in options.products:
        vl.parse(product)
    with bench_extra():  # here, so that --help and an unknown name need neither timm nor PEFT
        from benchmarks import products
    torch.manual_seed(0)
    plan = products.prepare(options.model, options.depth, options.products, options.rank)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    rows = []
    with Console(stderr=True).status("measuring plain LoRA") as status:
        for row in products.measured(
            plan, options.batch, options.repeats, options.threads, options.minutes
        ):
            rows.append(row)
            status.update(f"{len(rows)} of {len(plan.recipes)} measured, the last is {row.product}")
    Console().print(table(rows, options))
    print(f"{NOTE} Measured in {time.monotonic() - start:.0f} s.")
    if options.json is not None:
        lines = [json.dumps(record(row, options)) for row in rows]
        write_text_atomically(options.json, "\n".join(lines) + "\n")


def table(rows: list["Row"], options: argparse.Namespace) -> Table:
    """Return the results for people."""
    title = f"{options.model}, {options.depth} blocks, batch {options.batch}"
    shown = Table(title=f"{title}, {options.threads} thread(s): one training step, with AdamW")
    for heading in ("product", "beside"):
        shown.add_column(heading)
    for heading in ("step", "goal", "seconds", "state MB", "beside it"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.product,
            row.beside,
            f"{row.step_ratio:.2f}",
            "" if row.goal is None else f"<= {row.goal:g}",
            f"{row.step_seconds:.3f}",
            *(f"{size / 1e6:.2f}" for size in (row.state_bytes, row.beside_state_bytes)),
        )
    return shown


def record(row: "Row", options: argparse.Namespace) -> dict[str, Any]:
    """Return a result as one JSON line's object."""
    return {
        "product": row.product,
        "beside": row.beside,
        "model": options.model,
        "rank": options.rank,
        "batch": options.batch,
        "step_ratio": round(row.step_ratio, 4),
        "goal": row.goal,
        "depth": options.depth,
        "threads": options.threads,
        "repeats": row.repeats,
        "step_seconds": round(row.step_seconds, 4),
        "state_bytes": row.state_bytes,
        "beside_state_bytes": row.beside_state_bytes,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--products",
        nargs="+",
        default=[],
        metavar="NAME",
        help="presets or products such as block-lora+glad; default: every training dynamics",
    )
    add_setting(parser, repeats=15, minutes=20.0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
