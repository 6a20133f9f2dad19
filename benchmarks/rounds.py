"""The order of a run: checks first, then one group of contestants after the other.

A group is the floor with PEFT's and our form of one method, so that few models are in memory at a
time and each ratio has its own floor beside it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

import visionlora as vl
from benchmarks.contestants import (
    adapted,
    build_base,
    check_sites,
    floor,
    full_finetuning,
    method_config,
)
from benchmarks.measure import Result, make_batch, measure
from benchmarks.peers import PEERS
from benchmarks.turns import clock_for


@dataclass(frozen=True)
class Plan:
    """What will be measured."""

    base: nn.Module
    methods: list[str]
    rank: int | None


def prepare(model: str, depth: int, methods: Sequence[str], rank: int | None) -> Plan:
    """Build the base model and refuse what cannot be measured, before anything is.

    No methods means every registered method that PEFT has too, `all` every one that serves these
    layers.

    Raises:
        ConfigError: an unknown model or method, or a rank that a method cannot have.
    """
    names = list(methods) or [name for name in vl.list_methods() if name in PEERS]
    if names == ["all"]:
        served = "linear"
        names = [name for name in vl.list_methods() if served in vl.get_method(name).config.kinds]
    configs = [method_config(name, rank) for name in names]
    base = build_base(model, depth)
    for config in configs:
        check_sites(base, config)
    return Plan(base, names, rank)


def measured(
    plan: Plan, batch_size: int, repeats: int, threads: int, minutes: float
) -> Iterator[Result]:
    """Yield the results; each group gets an equal share of the minutes that are left."""
    deadline = time.monotonic() + 60 * minutes
    batch = make_batch(plan.base, batch_size)
    ground = floor(plan.base)
    clock = clock_for(threads)
    for index, method in enumerate([None, *plan.methods]):
        share = (deadline - time.monotonic()) / 60 / (1 + len(plan.methods) - index)
        if method is None:
            group = [ground, full_finetuning(plan.base)]
        else:
            group = [ground, *adapted(plan.base, method, plan.rank)]
        results = measure(group, batch, repeats, clock, share)
        yield from results if method is None else results[1:]
