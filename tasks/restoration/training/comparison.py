"""The figures of a comparison as tables: mean and sample standard deviation over seeds."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One run."""

    method: str
    count: int
    """Pictures that it was trained on."""
    seed: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """All seeds of one method with one number of pictures."""

    method: str
    count: int
    seeds: int
    psnr: float
    psnr_std: float
    """0 for one seed."""
    ssim: float
    percent: float
    """Share of the parameters that is trained."""


def summarised(records: Sequence[Record]) -> list[Line]:
    """Return a line for every method and number of pictures, in the order in which they come."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.method, record.count), []).append(record)
    lines = []
    for (method, count), group in groups.items():
        psnr = [record.figures["test_psnr"] for record in group]
        lines.append(
            Line(
                *(method, count, len(group), statistics.fmean(psnr)),
                statistics.stdev(psnr) if len(psnr) > 1 else 0.0,
                statistics.fmean(record.figures["test_ssim"] for record in group),
                statistics.fmean(record.figures["trainable_percent"] for record in group),
            )
        )
    return lines


def markdown(lines: Sequence[Line], reference: Mapping[str, float], title: str) -> str:
    """Return a table with a row for each method and a column for each number of pictures.

    Args:
        lines: the figures.
        reference: PSNR without any training, by what it is of.
        title: the line above.
    """
    counts = sorted({line.count for line in lines})
    found = {(line.method, line.count): line for line in lines}
    head = ["method", "tuned", *(f"{count} pictures" for count in counts)]
    rows = [[name, "0 %", *(f"{psnr:.2f}" for _ in counts)] for name, psnr in reference.items()]
    for method in dict.fromkeys(line.method for line in lines):
        own = [found.get((method, count)) for count in counts]
        percents = [line.percent for line in own if line]
        share = f"{max(percents):.1f} %"
        rows.append([method, share, *(_cell(line) for line in own)])
    table = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return f"{title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)


def runs_csv(records: Sequence[Record]) -> str:
    """Return the figures of every run."""
    names = list(records[0].figures)
    head = ["method", "train_images", "seed", *names]
    rows = [
        [record.method, record.count, record.seed, *(record.figures[name] for name in names)]
        for record in records
    ]
    return _csv([head, *rows])


def summary_csv(lines: Sequence[Line]) -> str:
    """Return mean and spread of every method and number of pictures."""
    head = ["method", "train_images", "seeds", "psnr", "psnr_std", "ssim", "trainable_percent"]
    rows = [
        [
            *(line.method, line.count, line.seeds, f"{line.psnr:.4f}", f"{line.psnr_std:.4f}"),
            *(f"{line.ssim:.5f}", f"{line.percent:.4f}"),
        ]
        for line in lines
    ]
    return _csv([head, *rows])


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    return f"{line.psnr:.2f}" + (f" ± {line.psnr_std:.2f}" if line.seeds > 1 else "")


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
