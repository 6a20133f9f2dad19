"""Measure LoRAT beside the same tracker with PEFT's LoRA: a training step, saved bytes, a frame.

python benchmarks/tracking_step.py [--tracker lorat-b-224] [--batch 4] [--json FILE]     see --help

Both sides have the same frozen backbone with random weights, token types and head, and adapters of
rank 64 on q, k, v, the output projection and both layers of the MLP. For PEFT the fused projection
of q, k and v is divided into three linear layers first, as LoRAT's authors do, so that each has
factors of its own; ours has them on the fused one, plain and with lean activations. Times are taken
in turns in one process, each ratio inside one round, and the median is shown; a frame is one search
crop with merged adapters, which are the same plain and lean.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import visionlora as vl
from benchmarks.step import bench_extra, check_json, count
from benchmarks.turns import clock_for, in_turns, median_ratio
from tasks.tracking.losses import tracking_loss
from tasks.tracking.model import LoRAT, build
from tasks.tracking.model.variants import TrackerShape, find_variant
from visionlora.io.atomic import write_text_atomically
from visionlora.plan import saved_bytes
from visionlora.training.cli import run_cli

RANK = 64
GOALS = {"step": 1 / 0.9, "saved": 1 / 0.75, "frame": 1.0}
"""How many times ours PEFT's figure has to be, at least."""
LABELS = {
    "step": ("one training step", "s", 2),
    "saved": ("kept for the backward", "MB", 0),
    "frame": ("one frame, merged", "ms", 0),
}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    peft: float
    ours: float
    ratio: float
    """How many times ours PEFT's figure is."""
    rounds: int
    lean: bool = False
    """Whether ours has lean activations."""


class SplitAttention(nn.Module):
    """Self-attention with a linear layer each for q, k and v, as LoRAT's authors adapt it."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        width = fused.qkv.in_features
        self.heads = fused.num_heads
        parts = []
        for weight, bias in zip(fused.qkv.weight.chunk(3), fused.qkv.bias.chunk(3), strict=True):
            parts.append(nn.Linear(width, width))
            parts[-1].load_state_dict({"weight": weight, "bias": bias})
        self.q, self.k, self.v = parts
        self.proj = fused.proj

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every other."""
        parts = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        return self.proj(y.transpose(1, 2).flatten(2))


def ours(tracker: str, *, lean: bool = False) -> LoRAT:
    """Return the tracker with this project's LoRA."""
    return build(tracker, method="lorat", backbone_weights="random", rank=RANK, lean=lean)


def with_peft(tracker: str) -> LoRAT:
    """Return the tracker with PEFT's LoRA."""
    import peft

    model = build(tracker, method=None, backbone_weights="random").requires_grad_(False)
    for block in model.blocks:
        block.attn = SplitAttention(block.attn)
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(fc1|fc2))",
    )
    peft.inject_adapter_in_model(settings, model)
    model.head.requires_grad_(True)
    model.embedding.types.requires_grad_(True)
    return model


def pairs(shape: TrackerShape, batch: int) -> dict[str, Tensor]:
    """Return random crops with a box in their middle."""
    make = torch.Generator().manual_seed(0)
    grid = shape.search_grid
    positive = torch.zeros(batch, grid, grid, dtype=torch.bool)
    positive[:, grid // 4 : -grid // 4, grid // 4 : -grid // 4] = True
    return {
        "template": torch.randn(batch, 3, shape.template_px, shape.template_px, generator=make),
        "search": torch.randn(batch, 3, shape.search_px, shape.search_px, generator=make),
        "mask": torch.ones(batch, shape.template_grid, shape.template_grid, dtype=torch.int64),
        "truth": torch.tensor([0.25, 0.25, 0.75, 0.75]).repeat(batch, 1),
        "positive": positive,
    }


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the training loss of a batch."""
    prediction = model(batch["template"], batch["search"], batch["mask"])
    return tracking_loss(prediction, batch["truth"], batch["positive"]).total


def kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the bytes that the forward keeps for the backward."""
    with saved_bytes([*model.parameters(), *model.buffers()]) as counted:
        loss = loss_of(model, batch)
    found = counted()
    loss.backward()
    return found


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    clock: Callable[[], float],
) -> float:
    """Return the seconds of a training step."""
    began = clock()
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return clock() - began


@torch.inference_mode()
def frame(model: LoRAT, remembered: Tensor, search: Tensor, clock: Callable[[], float]) -> float:
    """Return the seconds of one frame."""
    began = clock()
    model.locate(remembered, search)
    return clock() - began


def merged(model: LoRAT, *, by_peft: bool) -> LoRAT:
    """Return the tracker with its adapters in the weights."""
    if by_peft:
        from peft.tuners.lora.layer import Linear

        for layer in [item for item in model.modules() if isinstance(item, Linear)]:
            layer.merge()
        return model
    vl.eject(model, merge=True)
    return model


def compare(tracker: str, batch: int, rounds: int, threads: int) -> list[Row]:
    """Measure all sides in turns."""
    torch.set_num_threads(threads)
    clock = clock_for(threads)
    models = [with_peft(tracker), ours(tracker), ours(tracker, lean=True)]
    for model in models:
        model.train()
    data = pairs(find_variant(tracker).shape, batch)
    bytes_kept = [kept(model, data) for model in models]
    steps = []
    for model in models:
        trained = [item for item in model.parameters() if item.requires_grad]
        steps.append(partial(step, model, torch.optim.AdamW(trained, lr=1e-4), data, clock))
    step_times = _timed(steps, rounds)
    done = [merged(model.eval(), by_peft=not index) for index, model in enumerate(models[:2])]
    one = {name: item[:1] for name, item in data.items()}
    frames = []
    for model in done:
        with torch.inference_mode():
            remembered = model.remember(one["template"], one["mask"])
        frames.append(partial(frame, model, remembered, one["search"], clock))
    frame_times = _timed(frames, 4 * rounds)
    rows = []
    for own, lean in ((1, False), (2, True)):
        sizes = bytes_kept[0] / 1e6, bytes_kept[own] / 1e6
        rows.append(_row("step", [step_times[0], step_times[own]], 1.0, lean))
        rows.append(Row("saved", *sizes, sizes[0] / sizes[1], 1, lean))
    return [*rows, _row("frame", frame_times, 1e3)]


def _timed(jobs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    for job in jobs:  # warm up
        job()
    return in_turns(jobs, rounds, time.monotonic() + 600)


def _row(what: str, times: list[list[float]], unit: float, lean: bool = False) -> Row:
    theirs, own = times
    middle = [unit * statistics.median(side) for side in times]
    return Row(what, middle[0], middle[1], median_ratio(theirs, own), len(own), lean)


def table(rows: list[Row], options: argparse.Namespace) -> Table:
    """Return the results for people."""
    shown = Table(
        title=f"{options.tracker}, random weights, {options.batch} pairs, "
        f"{options.threads} thread(s)"
    )
    for heading in ("", "PEFT", "ours", "ratio", "goal"):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        name, unit, digits = LABELS[row.what]
        name += ", lean" if row.lean else ""
        figures = (f"{value:.{digits}f} {unit}" for value in (row.peft, row.ours))
        shown.add_row(name, *figures, f"{row.ratio:.2f}", f"{GOALS[row.what]:.2f}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, print the table, write the JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tracker", default="lorat-b-224", help="(lorat-b-224)")
    parser.add_argument("--batch", type=count, default=4, help="pairs in one step (4)")
    parser.add_argument("--rounds", type=count, default=5, help="timed rounds (5)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one line per row")
    options = parser.parse_args(argv)
    check_json(options.json)
    with bench_extra():
        rows = compare(options.tracker, options.batch, options.rounds, options.threads)
    Console().print(table(rows, options))
    if options.json is not None:
        shared = {"tracker": options.tracker, "batch": options.batch, "threads": options.threads}
        lines = [json.dumps({**asdict(row), **shared, "rank": RANK}) for row in rows]
        write_text_atomically(options.json, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_cli(main)
