"""A protocol as a picture: accuracy against shots, a line per method, the spread over seeds.

With one number of shots only, every method is a mark with its spread, among the dots of its seeds.
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.fewshot.pictures import new_figure, save_figure
from tasks.fewshot.protocol.figures import AVERAGE, Line, Record, headline
from tasks.fewshot.report import COLUMNS

WIDTH, HEIGHT = 4.6, 3.6
PANELS_A_ROW = 4


def save_plot(
    records: Sequence[Record],
    lines: Sequence[Line],
    zero: dict[str, dict[str, float]],
    title: str,
    path: Path,
) -> Path:
    """Draw a panel per data set (base-to-new: per figure of their average), and write a PNG file.

    Args:
        records: Single runs, averages included.
        lines: Their means and spreads.
        zero: Zero-shot figures by data set, averages included; they are dashed.
        title: Of the whole picture.
        path: Where it goes.
    """
    panels = _panels(list(zero), headline(lines[0].figures))
    columns = min(PANELS_A_ROW, len(panels))
    count = -(-len(panels) // columns)
    figure = new_figure(WIDTH * columns, HEIGHT * count + 0.6)
    cells = figure.subplots(count, columns, squeeze=False).flatten()
    methods = list(dict.fromkeys(line.method for line in lines))
    shots = sorted({line.shots for line in lines})
    for cell in cells[len(panels) :]:
        cell.axis("off")
    for cell, (name, key, head) in zip(cells, panels, strict=False):
        if key in zero[name]:
            style = {"color": "gray", "linestyle": "--", "linewidth": 1, "label": "zero-shot"}
            cell.axhline(zero[name][key], **style)
        for place, method in enumerate(methods):
            own = sorted(
                (line for line in lines if (line.dataset, line.method) == (name, method)),
                key=lambda line: line.shots,
            )
            if not own:
                continue
            means = [line.figures[key].mean for line in own]
            # One seed has no spread.
            spread = [line.figures[key].std if line.figures[key].count > 1 else 0 for line in own]
            where = [line.shots for line in own] if len(shots) > 1 else [place]
            style = {"marker": "o", "capsize": 3, "color": f"C{place % 10}", "label": method}
            cell.errorbar(where, means, yerr=spread, **style)
            if len(shots) == 1:
                runs = [r for r in records if (r.dataset, r.method) == (name, method)]
                dots = [run.figures[key] for run in runs]
                cell.scatter([place + 0.2] * len(dots), dots, s=9, color=f"C{place % 10}")
        cell.set_title(head, fontsize=10)
        cell.grid(alpha=0.3)
        if len(shots) > 1:
            cell.set_xscale("log", base=2)
            cell.set_xticks(shots, [str(number) for number in shots])
            cell.set_xlabel("shots per class")
        else:
            cell.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=7)
    for row in range(count):
        cells[row * columns].set_ylabel("accuracy, %")
    handles, labels = cells[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def _panels(names: list[str], keys: list[str]) -> list[tuple[str, str, str]]:
    """Return data set, figure and title of every panel."""
    if len(keys) == 1:
        return [(name, keys[0], name) for name in names]
    name = AVERAGE if AVERAGE in names else names[0]
    return [(name, key, f"{name}: {COLUMNS[key]}") for key in keys]
