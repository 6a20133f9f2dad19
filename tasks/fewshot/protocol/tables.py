"""The tables of a protocol as rows of text, for Markdown, for the screen, and as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.fewshot.protocol.config import ProtocolConfig
from tasks.fewshot.protocol.figures import AVERAGE, HALVES, Line, Record

ABSENT = "-"
SPOKEN = {"harmonic_mean": "H"}


@dataclass(frozen=True)
class Grid:
    """One table: a title, the heads of its columns, and rows of as many cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return a Markdown table below its title."""
        rows = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        text = "\n".join(
            f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows
        )
        return f"**{self.title}**\n\n{text}\n"


def grids(
    config: ProtocolConfig,
    lines: Sequence[Line],
    zero: dict[str, dict[str, float]],
    splits: dict[str, str],
    reference: str,
) -> list[Grid]:
    """Return the tables of a protocol; the last one sums up.

    Args:
        config: The protocol.
        lines: What `figures.lines` returned.
        zero: Zero-shot figures by data set, averages included.
        splits: Whose split a data set has.
        reference: The method that differences are taken to.
    """
    named = {name: f"{name} (own split)" if splits.get(name) == "own" else name for name in zero}
    if config.transfers and AVERAGE in zero:
        named[AVERAGE] = "average of targets"
    if config.name == "base-to-new":
        return [
            _halves(
                named[name], [line for line in lines if line.dataset == name], figures, reference
            )
            for name, figures in zero.items()
        ]
    if len(zero) == 1:
        return [_by_shots(name, lines, figures) for name, figures in zero.items()]
    return [
        _by_dataset(shots, [line for line in lines if line.shots == shots], zero, named)
        for shots in config.all_shots
    ]


def _halves(title: str, lines: Sequence[Line], zero: dict[str, float], reference: str) -> Grid:
    """Base, new and harmonic mean of one data set, and how they differ from the reference."""
    keys = [SPOKEN.get(key, key) for key in HALVES]
    several = len({line.shots for line in lines}) > 1
    columns = ["method", *keys, *(f"{key} - {reference}" for key in keys), "parameters", "lr"]
    rows = [["zero-shot", *(f"{zero[key]:.1f}" for key in HALVES), *[ABSENT] * 5]] if zero else []
    for line in lines:
        method = f"{line.method}, {line.shots} shots" if several else line.method
        differences = [ABSENT] * len(HALVES)
        if line.method != reference and line.differences:
            differences = [line.differences[key].text(sign=True) for key in HALVES]
        values = [line.figures[key].text() for key in HALVES]
        rows.append([method, *values, *differences, _count(line.parameters), _rate(line.lr)])
    return Grid(title, columns, rows)


def _by_shots(name: str, lines: Sequence[Line], zero: dict[str, float]) -> Grid:
    """One data set: a column per number of shots."""
    shots = sorted({line.shots for line in lines})
    rows = [["zero-shot", *[f"{zero['accuracy']:.1f}"] * len(shots), ABSENT]] if zero else []
    for method in dict.fromkeys(line.method for line in lines):
        own = {line.shots: line for line in lines if line.method == method}
        values = [own[n].figures["accuracy"].text() if n in own else ABSENT for n in shots]
        rows.append([method, *values, _count(next(iter(own.values())).parameters)])
    heads = [f"{n} shot{'s' * (n != 1)}" for n in shots]
    return Grid(name, ["method", *heads, "parameters"], rows)


def _by_dataset(
    shots: int, lines: Sequence[Line], zero: dict[str, dict[str, float]], named: dict[str, str]
) -> Grid:
    """One number of shots: a column per data set."""
    rows: list[list[str]] = []
    if all(zero.values()):
        rows = [["zero-shot", *(f"{figures['accuracy']:.1f}" for figures in zero.values()), ABSENT]]
    for method in dict.fromkeys(line.method for line in lines):
        own = {line.dataset: line for line in lines if line.method == method}
        values = [own[n].figures["accuracy"].text() if n in own else ABSENT for n in zero]
        rows.append([method, *values, _count(next(iter(own.values())).parameters)])
    title = f"{shots} shot{'s' * (shots != 1)}"
    return Grid(title, ["method", *(named[name] for name in zero), "parameters"], rows)


def runs_csv(records: Sequence[Record]) -> str:
    """Return one row per run and data set."""
    keys = list(dict.fromkeys(key for record in records for key in record.figures))
    heads = [
        "dataset",
        "split",
        "role",
        "method",
        "shots",
        "seed",
        *keys,
        "lr",
        "steps",
        "parameters",
    ]
    return _csv(
        heads,
        [
            [r.dataset, r.split, r.role, r.method, r.shots, r.seed]
            + [r.figures.get(key, "") for key in keys]
            + [r.lr, r.steps, r.parameters]
            for r in records
        ],
    )


def summary_csv(lines: Sequence[Line], zero: dict[str, dict[str, float]], reference: str) -> str:
    """Return one row per data set, method and number of shots, zero-shot and averages included."""
    keys = list(dict.fromkeys(key for line in lines for key in line.figures))
    heads = ["dataset", "method", "shots", "seeds"]
    for key in keys:
        heads += [key, f"{key}_std", f"{key}_minus_{reference}", f"{key}_minus_{reference}_std"]
    rows: list[list[object]] = [
        [name, "zero-shot", 0, 0, *(c for key in keys for c in (figures.get(key, ""), "", "", ""))]
        for name, figures in zero.items()
        if figures
    ]
    for line in lines:
        cells: list[object] = []
        for key in keys:
            found, other = line.figures.get(key), line.differences.get(key)
            cells += [_digits(found.mean), _digits(found.std)] if found else ["", ""]
            cells += [_digits(other.mean), _digits(other.std)] if other else ["", ""]
        count = next(iter(line.figures.values())).count
        rows.append([line.dataset, line.method, line.shots, count, *cells])
    return _csv(heads, rows)


def _csv(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _count(parameters: int) -> str:
    return f"{parameters:,}" if parameters else ABSENT


def _rate(lr: float) -> str:
    return ABSENT if math.isnan(lr) else f"{lr:.3g}"
