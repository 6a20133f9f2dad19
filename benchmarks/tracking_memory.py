"""Plan the memory of training a LoRAT tracker, on any machine and without weights.

python benchmarks/tracking_memory.py [--tracker lorat-g-224] [--batch 16] [--half] [--json FILE]

One step of the tracking task (forward, loss, backward, AdamW) is carried out on tensors that have
shapes and no values, see `visionlora/plan.py`. LoRAT's authors report 25.8 GB for lorat-g-224 with
16 pairs on one GPU (Lin et al. 2024, 2403.05231); what a GPU adds of its own is not in the plan.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.step import check_json, count
from tasks.tracking.losses import tracking_loss
from tasks.tracking.model import build
from tasks.tracking.model.variants import TrackerShape, find_variant
from visionlora.io.atomic import write_text_atomically
from visionlora.plan import MemoryPlan, Precision, plan
from visionlora.training.cli import run_cli

GB = 1e9
LABELS = {
    "frozen": "frozen weights",
    "trained": "adapters, types and head",
    "state": "AdamW's two moments",
    "saved": "kept by the forward for the backward",
    "passing": "on its way at the worst moment",
    "peak": "peak",
}


def planned(tracker: str, batch: int, precision: Precision, half: bool, rank: int) -> MemoryPlan:
    """Return the plan of one training step of a tracker."""
    shape = find_variant(tracker).shape
    return plan(
        partial(_model, tracker, rank),
        _loss,
        _pairs(shape, batch),
        precision=precision,
        frozen_dtype=torch.float16 if half else None,
        optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.1),
    )


def _model(tracker: str, rank: int) -> torch.nn.Module:
    model = build(tracker, method=f"lora(rank={rank})", backbone_weights="random", device="meta")
    return model.train()


def _pairs(shape: TrackerShape, batch: int) -> dict[str, torch.Tensor]:
    """Return a batch of the right shapes, on no device."""
    make: Callable[..., torch.Tensor] = partial(torch.empty, device="meta")
    grid = shape.search_grid
    return {
        "template": make(batch, 3, shape.template_px, shape.template_px),
        "search": make(batch, 3, shape.search_px, shape.search_px),
        "mask": make(batch, shape.template_grid, shape.template_grid, dtype=torch.int64),
        "truth": make(batch, 4),
        "positive": make(batch, grid, grid, dtype=torch.bool),
    }


def _loss(model: Any, pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    prediction = model(pairs["template"], pairs["search"], pairs["mask"])
    return tracking_loss(prediction, pairs["truth"], pairs["positive"]).total


def table(options: argparse.Namespace, made: MemoryPlan) -> Table:
    """Return the plan for people."""
    kept = "half" if options.half else "full"
    shown = Table(
        title=f"{options.tracker}, {options.batch} pairs, {options.precision}, "
        f"frozen weights in {kept} precision"
    )
    shown.add_column("what")
    shown.add_column("GB", justify="right")
    for name, label in LABELS.items():
        shown.add_row(label, f"{getattr(made, name) / GB:.2f}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Plan what the command line asks for and print the breakdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tracker", default="lorat-g-224", help="(lorat-g-224)")
    parser.add_argument("--batch", type=count, default=16, help="pairs in one step (16)")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp16")
    parser.add_argument("--half", action="store_true", help="keep frozen weights in 16 bits")
    parser.add_argument("--rank", type=count, default=64, help="rank of the adapters (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add one line to this file")
    options = parser.parse_args(argv)
    check_json(options.json)
    made = planned(options.tracker, options.batch, options.precision, options.half, options.rank)
    Console().print(table(options, made))
    if options.json is not None:
        line = {
            "tracker": options.tracker,
            "batch": options.batch,
            "precision": options.precision,
            "half": options.half,
            **asdict(made),
            "passing": made.passing,
        }
        before = options.json.read_text("utf-8") if options.json.exists() else ""
        write_text_atomically(options.json, before + json.dumps(line) + "\n")


if __name__ == "__main__":
    run_cli(main)
