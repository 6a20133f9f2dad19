"""Whole training steps of products (method + initialiser + dynamics), each beside its method alone.

A method that stands alone, such as SpIEL, is beside plain LoRA, and so is LoRA itself: its distance
to 1 is the noise of the table. A step is what `visionlora.dynamics.Stepper` runs: forward,
backward, every event, and AdamW. The two take turns in one process (see `measure`).
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionlora as vl
from benchmarks.contestants import TARGETS, build_base, check_sites, usual_options
from benchmarks.measure import make_batch
from benchmarks.turns import clock_for, in_turns, median_ratio
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError
from visionlora.ranks import controllers_of
from visionlora.registry import get_preset, list_dynamics

GOALS = {"glad": 2.1, "sam": 2.1}
"""Largest ratio that is aimed at, where there is one."""
OPTIONS = {"lisa": "lisa(gamma=1)"}
"""What a dynamics is measured as where its defaults would do nothing in a model of two blocks."""
WARM_UP = 2
"""Steps before the clock starts: state is allocated, and B leaves zero."""
RUN = 1000
"""Length of the run that a dynamics is told, for those that follow a schedule."""


@dataclass(frozen=True)
class Row:
    """The figures of one product."""

    product: str
    beside: str
    """What the ratio is taken to."""
    step_ratio: float
    step_seconds: float
    state_bytes: int
    """What optimiser and dynamics remember between two steps."""
    beside_state_bytes: int
    repeats: int
    goal: float | None


@dataclass(frozen=True)
class Plan:
    """What will be measured."""

    base: nn.Module
    recipes: list[vl.Recipe]
    rank: int | None


class Runner:
    """A product that trains."""

    def __init__(
        self, base: nn.Module, recipe: vl.Recipe, rank: int | None, batch: tuple[Tensor, Tensor]
    ) -> None:
        self.batch = batch
        self.model = copy.deepcopy(base)
        config = recipe.config(**usual_options(recipe.method, rank))
        looks = recipe.init is not None and bool(recipe.init.needs)
        vl.inject(self.model, config, TARGETS, init=None if looks else recipe.init)
        if looks:
            assert recipe.init is not None
            vl.initialise(self.model, recipe.init, [batch], loss)
        groups = vl.parameter_groups(self.model, lr=1e-5, weight_decay=0.01)
        self.optimizer = torch.optim.AdamW(groups)
        controllers = controllers_of(self.model, self.optimizer, RUN)
        own = recipe.build_dynamics(self.model, self.optimizer, RUN)
        self.stepper = Stepper(self.model, self.optimizer, dynamics=[*controllers, *own])

    def seconds(self, clock: Callable[[], float]) -> float:
        """Run one step and return how long it took."""
        start = clock()
        self.stepper.step([self.batch], partial(loss, self.model))
        return clock() - start

    def state_bytes(self) -> int:
        """Return the bytes of all tensors that the optimiser and the dynamics remember."""
        remembered = [dynamics.state_dict() for dynamics in self.stepper.dynamics]
        tensors = _tensors([list(self.optimizer.state.values()), remembered])
        storages = [item.untyped_storage() for item in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a batch of images and labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def default_products() -> list[str]:
    """Return LoRA itself, every registered dynamics, a start that is taken off, sparse methods."""
    sparse = [n for n in vl.list_methods() if vl.get_method(n).config.form == "sparse"]
    dynamics = [OPTIONS.get(name, name) for name in list_dynamics()]
    return [
        "lora",
        *(name if "(" in name else _product(name) for name in dynamics),
        "pissa",
        *sparse,
    ]


def _product(name: str) -> str:
    """Return the preset of a dynamics, or else the first method that it trains with it."""
    if get_preset(name) is not None:
        return name
    for method in vl.list_methods():
        try:
            return vl.parse(f"{method}+{name}").text
        except ConfigError:
            continue
    raise ConfigError(f"{name} trains no registered method")


def prepare(model: str, depth: int, products: Sequence[str], rank: int | None) -> Plan:
    """Build the base model and refuse what cannot be measured, before anything is.

    No products means those of `default_products`.

    Raises:
        ConfigError: an unknown model or name, a product that makes no sense, or a rank that a
            method cannot have.
    """
    recipes = [vl.parse(text) for text in products or default_products()]
    configs = [recipe.config(**usual_options(recipe.method, rank)) for recipe in recipes]
    base = build_base(model, depth)
    for config in configs:
        check_sites(base, config)
    return Plan(base, recipes, rank)


def measured(
    plan: Plan, batch_size: int, repeats: int, threads: int, minutes: float
) -> Iterator[Row]:
    """Yield the rows; each product gets an equal share of the minutes that are left."""
    deadline = time.monotonic() + 60 * minutes
    batch = make_batch(plan.base, batch_size)
    clock = clock_for(threads)
    alone: dict[str, Runner] = {}

    def started(recipe: vl.Recipe) -> Runner:
        runner = Runner(plan.base, recipe, plan.rank, batch)
        for _ in range(WARM_UP):
            runner.seconds(clock)
        return runner

    for index, recipe in enumerate(plan.recipes):
        share = (deadline - time.monotonic()) / (len(plan.recipes) - index)
        until = time.monotonic() + share
        method = recipe.method if recipe.init or recipe.dynamics else "lora"
        if method not in alone:
            alone[method] = started(vl.parse(method))
        pair = [alone[method], started(recipe)]
        turns = [partial(runner.seconds, clock) for runner in pair]
        beside, own = in_turns(turns, repeats, until)
        yield Row(
            recipe.text,
            method,
            median_ratio(own, beside),
            statistics.median(own),
            pair[1].state_bytes(),
            pair[0].state_bytes(),
            len(own),
            next((GOALS[item.name] for item in recipe.dynamics if item.name in GOALS), None),
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
