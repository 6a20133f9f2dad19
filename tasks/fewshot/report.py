"""What a run prints: notes on the way, one table at the end."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 110


def print_note(text: str) -> None:
    """Print one line at once, also into pipes."""
    print(text, flush=True)


def print_result(result: dict[str, Any], path: Path) -> None:
    """Print the closing table: zero-shot, every seed, mean and spread, then the cost."""
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
    """Return one row for zero-shot, one per seed, and one for the mean if there are several."""
    columns = [key for key in ("accuracy", "base", "new", "harmonic_mean") if key in result]
    table = Table(
        title=f"{result['dataset']}: {result['backbone']}, {result['method']}, "
        f"{result['shots']} shots, accuracy in %",
        title_justify="left",
        min_width=60,
    )
    table.add_column("")
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    zero = [result["zero_shot" if key == "accuracy" else f"zero_shot_{key}"] for key in columns]
    table.add_row("zero-shot", *(f"{value:.1f}" for value in zero))
    for seed in result["per_seed"]:
        table.add_row(f"seed {seed['seed']}", *(f"{seed[key]:.1f}" for key in columns))
    if len(result["per_seed"]) > 1:
        table.add_row(
            "mean ± std",
            *(f"{result[key]:.1f} ± {result[f'{key}_std']:.1f}" for key in columns),
            style="bold",
        )
    gains = [result[key] - value for key, value in zip(columns, zero, strict=True)]
    table.add_row("gain", *(f"{gain:+.1f}" for gain in gains))
    return table


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
