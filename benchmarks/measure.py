"""Time and saved bytes of one training step, relative to the floor.

Contestants take turns with the floor in one process, and each ratio is taken inside one round, so
that a machine that slows down slows both sides; the median over the rounds is reported.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import CLASSES, Contestant
from benchmarks.turns import in_turns, median_ratio
from visionlora import plan


@dataclass(frozen=True)
class Result:
    """Ratios of one contestant to the floor, and its own figures behind them."""

    contestant: Contestant
    step_ratio: float
    forward_ratio: float
    saved_ratio: float
    step_seconds: float
    saved_bytes: int
    repeats: int


def make_batch(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Return random images of the model's size and random labels."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.patch_embed.img_size  # type: ignore[union-attr,misc]
    images = torch.randn(size, 3, height, width, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def measure(
    group: Sequence[Contestant],
    batch: tuple[Tensor, Tensor],
    repeats: int,
    clock: Callable[[], float],
    minutes: float,
) -> list[Result]:
    """Measure a group whose first member is the floor, and return one result for each.

    The step that counts the saved bytes also warms each contestant up. No round is begun after
    `minutes`, except the first.
    """
    deadline = time.monotonic() + 60 * minutes
    saved = [saved_bytes(contestant.model, batch) for contestant in group]
    turns = [partial(timed_step, contestant.model, batch, clock) for contestant in group]
    times = in_turns(turns, repeats, deadline)
    forwards = [[forward for forward, _ in own] for own in times]
    steps = [[total for _, total in own] for own in times]
    return [
        Result(
            contestant,
            step_ratio=median_ratio(steps[index], steps[0]),
            forward_ratio=median_ratio(forwards[index], forwards[0]),
            saved_ratio=saved[index] / saved[0],
            step_seconds=statistics.median(steps[index]),
            saved_bytes=saved[index],
            repeats=len(steps[index]),
        )
        for index, contestant in enumerate(group)
    ]


def timed_step(
    model: nn.Module, batch: tuple[Tensor, Tensor], clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the seconds of the forward pass and of forward and backward together."""
    images, labels = batch
    start = clock()
    loss = F.cross_entropy(model(images), labels)
    middle = clock()
    loss.backward()
    end = clock()
    model.zero_grad(set_to_none=True)
    return middle - start, end - start


def saved_bytes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Return the bytes that autograd keeps for backward, each storage counted once.

    Parameters and buffers are left out: they stay in memory with or without a graph.
    """
    images, labels = batch
    with plan.saved_bytes([*model.parameters(), *model.buffers()]) as kept:
        loss = F.cross_entropy(model(images), labels)
    found = kept()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return found
