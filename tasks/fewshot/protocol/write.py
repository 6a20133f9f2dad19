"""What a protocol leaves: runs.csv, summary.csv, table.md, plot.png, result.json, and one table."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.fewshot.protocol.config import ProtocolConfig
from tasks.fewshot.protocol.figures import (
    AVERAGE,
    Findings,
    average,
    averages,
    lines,
    reference_of,
)
from tasks.fewshot.protocol.plot import save_plot
from tasks.fewshot.protocol.tables import Grid, grids, runs_csv, summary_csv
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory

PIPE_WIDTH = 400
"""Outside of a terminal a table of eleven data sets is not folded."""


def write_table(
    config: ProtocolConfig, findings: Findings, directory: RunDirectory
) -> dict[str, Any]:
    """Write all files, print the table that sums up, and return result.json's content."""
    records, zero, splits = findings.records, findings.zero, findings.splits
    reference = reference_of(config.method)
    found = lines(records, reference)
    tested = [name for name in zero if name != config.training]
    if len(tested) > 1:
        zero = {**zero, AVERAGE: average([zero[name] for name in tested])}
    tables = grids(config, found, zero, splits, reference)
    notes = _notes(config, findings, reference)
    folder = directory.path
    write_text_atomically(folder / "runs.csv", runs_csv(records))
    write_text_atomically(folder / "summary.csv", summary_csv(found, zero, reference))
    head = f"# {config.name}: {config.backbone}, accuracy in %\n"
    text = [head, *(table.markdown() for table in tables), *(f"{note}\n" for note in notes)]
    write_text_atomically(folder / "table.md", "\n".join(text))
    if found:
        title = f"{config.name}, {config.backbone}"
        save_plot([*records, *averages(records)], found, zero, title, folder / "plot.png")
    result = directory.write_result(
        {
            "task": "fewshot-protocol",
            "protocol": config.name,
            "backbone": config.backbone,
            "seeds": config.seed,
            "compared_with": reference,
            "splits": splits,
            "zero_shot": zero,
            "lines": found,
            "failed": findings.failed,
            "notes": findings.notes,
        }
    )
    if tables:
        _print(tables[-1], [*notes, f"table: {folder / 'table.md'}, plot: {folder / 'plot.png'}"])
    return result


def _notes(config: ProtocolConfig, findings: Findings, reference: str) -> list[str]:
    seeds = ", ".join(map(str, config.seed))
    several = len(config.seed) > 1
    notes = [f"Mean ± standard deviation over seeds {seeds}." if several else f"One seed: {seeds}."]
    if config.name == "base-to-new":
        notes.append(
            "H: harmonic mean of the mean base and new accuracies; its spread is that of the "
            f"harmonic means of single seeds. Differences to {reference} are taken seed by seed."
        )
    if len(config.lr or ()) > 1:
        rates = ", ".join(f"{lr:g}" for lr in config.lr or ())
        images = "validation images"
        if config.name == "base-to-new":
            images += " of the base classes"
        notes.append(f"Learning rate of each method chosen among {rates} on {images}.")
    if searches := findings.searches:
        steps = sum(search["steps"] for search in searches)
        seconds = sum(search["seconds"] for search in searches)
        notes.append(
            f"Learning rates searched on validation images (--lr auto): {steps:,} steps and "
            f"{seconds:.0f} s in all."
        )
    notes += findings.notes
    return notes + [f"Failed: {cell}: {reason}" for cell, reason in findings.failed.items()]


def _print(grid: Grid, notes: Sequence[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    table = Table(title=Text(f"{grid.title}, accuracy in %"), title_justify="left")
    for index, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
