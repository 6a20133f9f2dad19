"""What a run prints: notes on the way, one table at the end."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 110
COLUMNS = {
    "accuracy": "accuracy",
    "base": "base",
    "new": "new",
    "harmonic_mean": "harmonic mean",
    "ece": "ECE",
}
"""Figures of the closing table, with their headings; ECE: expected calibration error."""


def print_note(text: str) -> None:
    """Print one line at once, also into pipes."""
    print(text, flush=True)


def print_result(result: dict[str, Any], path: Path) -> None:
    """Print the closing table: what it is compared with, seeds, mean and spread, then the cost."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    if "lr_search" in result:
        console.print(search_table(result["lr_search"]))
    console.print(result_table(result))
    console.print(Text(cost_line(result)))
    notes = []
    if result["skipped_images"]:
        notes.append(f"{result['skipped_images']} unreadable images left out")
    if result["random_weights"]:
        notes.append("RANDOM WEIGHTS: timing only")
    if result["test_on"] == "val":
        notes.append("tested on validation images")
    if result["split"] == "own":
        notes.append("own split, not the published one")
    for note in notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"result: {path / 'result.json'}"), soft_wrap=True)


def result_table(result: dict[str, Any]) -> Table:
    """Return a row for zero-shot, the baselines, each seed, and the mean if there are several.

    The gain is that over zero-shot, or without a text tower that over the linear probe.
    """
    columns = [key for key in COLUMNS if key in result]
    table = Table(
        # As Text, in which `:five:` is no picture and `[x]` no markup.
        title=Text(
            f"{result['dataset']}: {result['backbone']}, {result['method']}, "
            f"{result['shots']} shots, in %"
        ),
        title_justify="left",
        min_width=60,
    )
    table.add_column("")
    for key in columns:
        table.add_column(COLUMNS[key], justify="right")
    zero = {
        key: result[name]
        for key in columns
        if (name := "zero_shot" if key == "accuracy" else f"zero_shot_{key}") in result
    }
    baselines = result.get("baselines", {})
    if zero:
        table.add_row("zero-shot", *_cells(zero, columns))
    for name, figures in baselines.items():
        table.add_row(name.replace("-", " "), *_cells(figures, columns))
    for seed in result["per_seed"]:
        table.add_row(f"seed {seed['seed']}", *(f"{seed[key]:.1f}" for key in columns))
    if len(result["per_seed"]) > 1:
        table.add_row(
            "mean ± std",
            *(f"{result[key]:.1f} ± {result[f'{key}_std']:.1f}" for key in columns),
            style="bold",
        )
    if before := zero or next(iter(baselines.values()), {}):
        gains = [f"{result[key] - before[key]:+.1f}" if key in before else "" for key in columns]
        table.add_row("gain", *gains)
    return table


def _cells(figures: dict[str, float], columns: list[str]) -> list[str]:
    return [f"{figures[key]:.1f}" if key in figures else "" for key in columns]


def search_table(search: dict[str, Any]) -> Table:
    """Return one row per learning rate that was tried, and what the search cost."""
    table = Table(
        title=f"lr {search['lr']:g}, chosen on {search['images']} {search['validation']}",
        title_justify="left",
        caption=f"{len(search['trials'])} trials, {search['steps']} steps, "
        f"{search['seconds']:.0f} s",
        caption_justify="left",
        min_width=60,
    )
    for heading in ("lr", "steps", "validation %", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for trial in sorted(search["trials"], key=lambda trial: trial["lr"]):
        chosen = trial["lr"] == search["lr"]
        table.add_row(
            f"{trial['lr']:g}",
            str(trial["steps"]),
            f"{trial['accuracy']:.1f}",
            "" if trial["loss"] is None else f"{trial['loss']:.3f}",
            "chosen" if chosen else trial["outcome"],
            style="bold" if chosen else None,
        )
    return table


def cost_line(result: dict[str, Any]) -> str:
    """Return parameters, time and memory in one line."""
    share = 100 * result["trainable_parameters"] / result["total_parameters"]
    return (
        f"{result['trainable_parameters']:,} trainable parameters ({share:.2f} % of the model), "
        f"{result['steps']} steps of {1000 * result['step_seconds']:.0f} ms, "
        f"{result['wall_seconds']:.0f} s, peak memory {result['peak_memory_mb']:.0f} MB"
    )
