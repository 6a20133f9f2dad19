"""The picture of contributions: a bar for every layer in the order of the network, and the kinds.

Bars are blue on the way down, grey in the middle, red on the way up. The axis is logarithmic: in
published pictures of CoLoRA (arXiv 2408.01099) the ends of the network and its middle lie three to
four powers of ten apart. A layer that has no contribution has no bar.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tasks.restoration.parameters import Part, in_running_order, kind_of, means_by_kind, part_of
from visionlora.errors import ConfigError
from visionlora.io.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: dict[Part, str] = {
    "encoder": "#4477aa",
    "middle": "#bbbbbb",
    "decoder": "#ee6677",
    "network": "#4477aa",
}
KIND_COLOUR = "#228833"
WIDTH_OF_A_BAR, LEAST_WIDTH, MOST_WIDTH = 0.17, 8.0, 24.0
"""In inches."""
NAMED = 100
"""Layers whose names fit below their bars; of more, the first of each block is named."""


def draw_scores(scores: Mapping[str, float], model: nn.Module, path: Path) -> Path:
    """Draw the scores of all layers and the means of the kinds.

    Args:
        scores: by parameter.
        model: the network, which is run once.
        path: PNG to write.

    Raises:
        ConfigError: matplotlib is missing.
    """
    drawn = figure_of(scores, model)
    return write_atomically(path, lambda temporary: drawn.savefig(temporary, format="png", dpi=130))


def figure_of(scores: Mapping[str, float], model: nn.Module) -> "Figure":
    """Return the picture before it is written."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ConfigError(
            "the picture of contributions needs matplotlib: pip install 'visionlora[restoration]'"
        ) from None
    layers = [
        name
        for name in in_running_order(model)
        if name in scores and kind_of(name, model) in ("conv", "linear")
    ]
    width = min(max(LEAST_WIDTH, WIDTH_OF_A_BAR * len(layers)), MOST_WIDTH)
    figure = Figure(figsize=(width, 4), layout="constrained")
    bars, kinds = figure.subplots(1, 2, sharey=True, width_ratios=[width - 1.5, 1.5])
    parts = [part_of(name) for name in layers]
    heights = [scores[name] or float("nan") for name in layers]
    bars.bar(range(len(layers)), heights, color=[COLOURS[part] for part in parts])
    bars.set_yscale("log")
    bars.set_xlim(-0.6, len(layers) - 0.4)
    bars.set_xticks(*_ticks(layers))
    bars.tick_params(axis="x", rotation=90, labelsize=6)
    bars.set_ylabel("mean contribution of a weight")
    named = [Patch(color=COLOURS[part], label=part) for part in dict.fromkeys(parts)]
    bars.legend(
        handles=named, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(named), frameon=False
    )
    means = means_by_kind(scores, model)
    kinds.bar(list(means), list(means.values()), color=KIND_COLOUR)
    kinds.tick_params(axis="x", rotation=90)
    kinds.set_title("mean by kind", fontsize=9)
    return figure


def _ticks(layers: list[str]) -> tuple[list[int], list[str]]:
    """Return which bars are named, and how."""
    names = [name.removesuffix(".weight") for name in layers]
    if len(names) <= NAMED:
        return list(range(len(names))), names
    blocks = [name.rpartition(".")[0] or name for name in names]
    blocks = [block.removesuffix(".sca") for block in blocks]
    firsts = [at for at, block in enumerate(blocks) if block not in blocks[:at]]
    return firsts, [blocks[at] for at in firsts]
