"""A comparison as a picture: PSNR against training pictures, or against methods if there is one.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; methods also differ
by their marks. Dashed is what the base does alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.restoration.training.comparison import Line
from visionlora.errors import ConfigError
from visionlora.io.atomic import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
WIDTH, HEIGHT = 6.4, 4.2
SHOWN = "base alone"


def save_plot(
    lines: Sequence[Line], reference: Mapping[str, float], title: str, path: Path
) -> Path:
    """Draw a comparison with its spread, and write a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(line.method for line in lines))
    counts = sorted({line.count for line in lines})
    if SHOWN in reference:
        axes.axhline(reference[SHOWN], color="grey", linestyle="--", linewidth=1, label=SHOWN)
    for place, method in enumerate(methods):
        own = sorted((line for line in lines if line.method == method), key=lambda x: x.count)
        where = [line.count if len(counts) > 1 else place for line in own]
        axes.errorbar(
            *(where, [line.psnr for line in own]),
            yerr=[line.psnr_std for line in own],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKS[place % len(MARKS)],
            capsize=3,
            label=method,
        )
    if len(counts) > 1:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("training pictures")
        axes.legend()
    else:
        axes.set_xticks(range(len(methods)), methods)
        axes.set_xlabel(f"method, {counts[0]} training pictures")
    axes.set_ylabel("test PSNR (dB)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    return write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
