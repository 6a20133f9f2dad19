"""Table and picture of the shifted domain, from the lines of `tracking_shift.py`.

python benchmarks/shift_report.py PICTURE.png
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lines import read
from visionlora.io.atomic import write_atomically

RESULTS = Path(__file__).parent / "results" / "tracking_shift.jsonl"
WORDS = {
    "lora": "LoRA, rank 8, types and head",
    "full": "all linear layers of the blocks, types and head",
    "head": "types and head",
}
COLOURS = {"lora": "#4477aa", "full": "#ee6677", "head": "#228833"}
Line = Mapping[str, Any]


def table(path: Path = RESULTS) -> str:
    """Return the table of what was trained, what it costs, and what it is worth."""
    lines = list(read(path))
    before = next((line for line in lines if line["method"] == "before"), None)
    if before is None:
        return "No measurement is stored: run `python benchmarks/tracking_shift.py`."
    rows = [
        "| trained on the shifted pairs | numbers | share | rate | AUC by night | AUC by day |",
        "|---|---|---|---|---|---|",
        f"| nothing | 0 | | | {before['night_auc']:.1f} | {before['auc']:.1f} |",
    ]
    for method, runs in by_method(lines).items():
        first = runs[0]
        trained = first["trainable_parameters"]
        cells = [_spread([run[key] for run in runs]) for key in ("night_auc", "auc")]
        rows.append(
            f"| {WORDS[method]} | {trained:,} | {trained / first['parameters']:.0%} | "
            f"{first['chosen_rate']:g} | {' | '.join(cells)} |"
        )
    speed = next((line for line in lines if line["method"] == "speed"), None)
    if speed is not None:
        merged, beside = speed["merged_fps"], speed["unmerged_fps"]
        rows += [
            "",
            f"With its adapters merged the tracker runs at {merged / beside:.2f} of the speed that "
            f"it has with them beside the weights ({merged:.0f} and {beside:.0f} frames per second "
            "on one thread).",
        ]
    return "\n".join(rows)


def by_method(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the runs of every method, all seeds."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "trained" in line:
            found.setdefault(line["trained"], []).append(line)
    return {method: found[method] for method in WORDS if method in found}


def draw(path: Path, lines: Sequence[Line]) -> Path:
    """Draw AUC by night against the trained share, with every seed and what was before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(6, 4), layout="constrained")
    before = next(line for line in lines if line["method"] == "before")
    for key, style in (("night_auc", "-"), ("auc", ":")):
        plot.axhline(before[key], color="grey", linestyle=style, linewidth=1)
    for method, runs in by_method(lines).items():
        share = [100 * run["trainable_parameters"] / run["parameters"] for run in runs]
        options: dict[str, Any] = {"color": COLOURS[method], "s": 40}
        plot.scatter(share, [run["night_auc"] for run in runs], label=WORDS[method], **options)
        plot.scatter(share, [run["auc"] for run in runs], marker="x", **options)
    plot.set(
        xlabel="trained share of the tracker, %",
        ylabel="AUC on six real sequences",
        title="adapted to the night: dots by night, crosses by day\n"
        "grey: before (solid by night, dotted by day)",
    )
    plot.title.set_fontsize(10)
    plot.set_xscale("log")
    plot.legend(fontsize=8)
    plot.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)
    return path


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


if __name__ == "__main__":
    print(table())
    draw(Path(sys.argv[1]), list(read(RESULTS)))
