"""What is told about evaluated trackers: tables, CSV, JSON; the protocol beside every figure.

```
report.md          the table of trackers, AUC by attribute, what the protocol means
sequences.csv      every sequence of every tracker, the worst first
scores.json        all figures with the three curves
*.png              curves and attributes, see plots.py
```
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.tracking.evaluation.metrics import (
    NORM_PRECISION_THRESHOLDS,
    PRECISION_THRESHOLDS,
    SUCCESS_THRESHOLDS,
    Figures,
)
from tasks.tracking.evaluation.plots import plot
from tasks.tracking.evaluation.protocols import Protocol
from tasks.tracking.evaluation.scoring import Evaluation
from visionlora.io.atomic import write_text_atomically

NONE = "-"
COLUMNS = (
    *("tracker", "sequence", "frames", "absent", "invalid"),
    *("auc", "op50", "op75", "precision", "norm_precision", "fps", "protocol"),
)


def write_report(
    evaluations: Sequence[Evaluation], folder: str | Path, *, plots: bool = True
) -> list[Path]:
    """Write all files of a report and return them; `plots` are most of its time."""
    home = Path(folder)
    written = [
        write_text_atomically(home / "report.md", markdown(evaluations)),
        write_text_atomically(home / "sequences.csv", sequences_csv(evaluations)),
        write_text_atomically(home / "scores.json", scores_json(evaluations)),
    ]
    return written + (plot(evaluations, home) if plots else [])


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Return the whole report as Markdown, readable in a terminal, too."""
    parts = [table(evaluations)]
    if evaluations[0].by_attribute:
        parts.append(attribute_table(evaluations))
    parts.append(explanation(evaluations[0].protocol))
    return "\n\n".join(parts) + "\n"


def table(evaluations: Sequence[Evaluation]) -> str:
    """Return one line per tracker, the best first; figures in percent."""
    rates = any(item.got10k for item in evaluations)
    head = ["Tracker", "Dataset", "#seq", "AUC", "OP50", "OP75", "P", "P_norm", "AO"]
    head += ["SR50", "SR75"] if rates else []
    rows = []
    for item in _ranked(evaluations):
        mean, own = item.mean, item.got10k
        row = [item.tracker, item.benchmark, str(len(item.sequences))]
        row += [_number(value) for value in (mean.auc, mean.op50, mean.op75)]
        row += [_number(mean.precision), _number(mean.norm_precision)]
        row += [_number(own.ao if own else None)]
        row += [_number(own.sr50 if own else None), _number(own.sr75 if own else None)] * rates
        rows.append([*row, _number(item.fps), item.protocol.name])
    return _aligned([[*head, "FPS", "protocol"], *rows], texts=2)


def attribute_table(evaluations: Sequence[Evaluation]) -> str:
    """Return AUC over the sequences with each attribute, one column per tracker."""
    ranked = _ranked(evaluations)
    head = [f"AUC ({ranked[0].protocol.name})", "#seq", *(item.tracker for item in ranked)]
    rows = [
        [name, str(mean.sequences), *(_number(item.by_attribute[name].auc) for item in ranked)]
        for name, mean in ranked[0].by_attribute.items()
    ]
    return _aligned([head, *rows], texts=1)


def explanation(protocol: Protocol) -> str:
    """Say in a few lines what the figures are."""
    absent = "count as failures" if protocol.absent_fails else "are scored like all others"
    curve = "the mean of its curve" if protocol.norm_precision != "at .20" else "at .20"
    lines = [
        f"Protocol {protocol.name}: P at 20 pixels, P_norm {curve}, figures in percent, mean over "
        f"sequences. Frames without the target {absent}; truth itself has AUC 95.24 on frames "
        "that all count.",
        "FPS: frames by the tracker's own time, decoding of images excluded.",
    ]
    return "\n".join(lines)


def sequences_csv(evaluations: Sequence[Evaluation]) -> str:
    """Return the figures of every sequence, of one tracker after the other, the worst first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in evaluations:
        for name, score in sorted(item.sequences.items(), key=lambda pair: pair[1].auc):
            figures = (score.auc, score.op50, score.op75, score.precision, score.norm_precision)
            speed = item.speed.get(name)
            writer.writerow(
                [item.tracker, name, score.frames, score.absent, score.invalid]
                + [f"{value:.3f}" for value in figures]
                + ["" if speed is None else f"{speed:.2f}", item.protocol.name]
            )
    return stream.getvalue()


def scores_json(evaluations: Sequence[Evaluation]) -> str:
    """Return everything there is to plot again, figures in percent and curves in 0..1."""
    described = {
        "benchmark": evaluations[0].benchmark,
        "protocol": evaluations[0].protocol.name,
        "thresholds": {
            "success": SUCCESS_THRESHOLDS.round(2).tolist(),
            "precision": PRECISION_THRESHOLDS.tolist(),
            "norm_precision": NORM_PRECISION_THRESHOLDS.round(2).tolist(),
        },
        "trackers": {item.tracker: _described(item) for item in _ranked(evaluations)},
    }
    return json.dumps(described, indent=1, allow_nan=False) + "\n"


def _described(item: Evaluation) -> dict[str, Any]:
    own = item.got10k
    rates = {"ao": own.ao, "sr50": own.sr50, "sr75": own.sr75} if own else {}
    return {
        "sequences": len(item.sequences),
        "left_out_of_mean": item.mean.dropped,
        **item.mean.as_dict(),
        **rates,
        "fps": item.fps,
        "curves": _curves(item.mean) | ({"got10k_success": own.curve.tolist()} if own else {}),
        "attributes": {
            name: {"sequences": mean.sequences, **mean.as_dict()}
            for name, mean in item.by_attribute.items()
        },
        "per_sequence": {
            name: {**score.as_dict(), "frames": score.frames, "absent": score.absent}
            for name, score in item.sequences.items()
        },
    }


def _curves(figures: Figures) -> dict[str, list[float]]:
    return {name: curve.tolist() for name, curve in vars(figures.curves).items()}


def _ranked(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    return sorted(evaluations, key=lambda item: -item.mean.auc)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _aligned(rows: list[list[str]], texts: int) -> str:
    """Return a Markdown table whose columns line up; the first `texts` and words are left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    left = [place < texts or not rows[1][place][-1].isdigit() for place in range(len(widths))]
    left = [flag and rows[1][place] != NONE for place, flag in enumerate(left)]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if flag else cell.rjust(width)
            for cell, width, flag in zip(row, widths, left, strict=True)
        )
        + " |"
        for row in rows
    ]
    rule = "|".join(
        ":" + "-" * (width + 1) if flag else "-" * (width + 1) + ":"
        for width, flag in zip(widths, left, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
