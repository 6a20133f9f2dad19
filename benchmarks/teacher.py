r"""A planted teacher: a small network was changed by a known rank, and an adapter is to find it.

    base     x + W2 tanh(W1 x), twice;   W1: 64 x 32,  W2: 32 x 64,  entries N(0, 1 / in)
    teacher  the same with W + U V^T in all four places,   U^T U = V^T V = I_4, drawn at random
    loss     mean (student(x) - teacher(x))^2,   x ~ N(0, I),   fresh batches in every step

A change of rank 4 can reach a loss of zero. Losses are relative to that of the base, which is the
same for every method, also for those whose start changes the function. Base, shift, data and the
adapter's own draws follow from the seed of the run, so methods see the same problem.

The network is two blocks of two layers, because LISA draws blocks and Half Fine-Tuning layers
inside a block. Weights without structure have a flat spectrum, and the shift does not know of their
singular vectors: what a start takes from the weight is of no help here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import visionlora as vl
from visionlora.dynamics import Stepper
from visionlora.errors import VisionLoraError
from visionlora.ranks import controllers_of
from visionlora.ranks.optimizer import set_rates
from visionlora.sites import named_generator

WIDTH, HIDDEN, DEPTH, RANK = 32, 64, 2, 4
BATCH, HELD_OUT, LOOKED_AT = 64, 256, 8
"""Inputs of a step, inputs of the loss that is reported, batches for starts that look at data."""
DIVERGED = 100.0
"""Loss, relative to that of the base, from which no run comes back."""

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two layers around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.fc2 = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus what the two layers make of it."""
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Network(nn.Module):
    """Blocks one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks."""
        for block in self.blocks:
            x = block(x)
        return x


class Problem:
    """Base, teacher and data of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.teacher = self.base()
        with torch.no_grad():
            for name, weight in self.teacher.named_parameters():
                generator = named_generator(seed, f"shift:{name}")
                up, down = (
                    torch.linalg.qr(torch.randn(size, RANK, generator=generator))[0]
                    for size in weight.shape
                )
                weight.add_(up @ down.T)
        self.held_out = self._batch("held out", HELD_OUT)
        self._kept: dict[int, Batch] = {}

    def base(self) -> Network:
        """Return the network before the change."""
        model = Network()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                generator = named_generator(self.seed, f"base:{name}")
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
        return model

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of a step."""
        if step not in self._kept:
            self._kept[step] = self._batch(f"step {step}", BATCH)
        return self._kept[step]

    def batches(self) -> Iterator[Batch]:
        """Yield what a start may look at."""
        return (self._batch(f"look {index}", BATCH) for index in range(LOOKED_AT))

    @torch.no_grad()
    def _batch(self, name: str, size: int) -> Batch:
        inputs = torch.randn(size, WIDTH, generator=named_generator(self.seed, f"data:{name}"))
        return inputs, self.teacher(inputs)


@dataclass(frozen=True)
class Curve:
    """What one run did."""

    losses: list[float]
    """Held-out loss after every step, relative to that of the base."""
    parameters: int
    """Trained scalars at the start."""

    def steps_to(self, fraction: float) -> int | None:
        """Return the first step whose loss is below `fraction`, None if there is none."""
        return next((i + 1 for i, loss in enumerate(self.losses) if loss < fraction), None)

    @property
    def final(self) -> float:
        """Mean of the last ten losses."""
        last = self.losses[-10:]
        return sum(last) / len(last)


def train(recipe: vl.Recipe, lr: float, problem: Problem, steps: int, until: float = 0.0) -> Curve:
    """Train a product on a problem with AdamW at a constant rate; a diverged run ends at inf.

    Args:
        recipe: the product.
        lr: learning rate.
        problem: what to learn.
        steps: length of the run.
        until: a loss at which it may end sooner.
    """
    model = problem.base()
    with torch.no_grad():
        before = float(loss(model, problem.held_out))
    looks = recipe.init is not None and bool(recipe.init.needs)
    vl.inject(
        model,
        recipe.config(**options_of(recipe, problem.seed)),
        init=None if looks else recipe.init,
    )
    if looks:
        assert recipe.init is not None
        vl.initialise(model, recipe.init, problem.batches(), loss)
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, lr, weight_decay=0.0))
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    count = sum(item.numel() for _, item in vl.trainable_parameters(model))
    controllers = controllers_of(model, optimizer, steps)
    own = recipe.build_dynamics(model, optimizer, steps)
    stepper = Stepper(model, optimizer, dynamics=[*controllers, *own])
    losses: list[float] = []
    try:
        for step in range(steps):
            set_rates(optimizer, step, 1.0)
            stepper.step([problem.batch(step)], lambda batch: loss(model, batch))
            with torch.no_grad():
                losses.append(float(loss(model, problem.held_out)) / before)
            if losses[-1] < until:
                return Curve(losses, count)
            if not losses[-1] < DIVERGED:
                break
    except VisionLoraError:  # not finite for many steps in a row
        pass
    finally:
        stepper.finish()
    losses = [value if value < DIVERGED else math.inf for value in losses]
    return Curve(losses + [math.inf] * (steps - len(losses)), count)


def options_of(recipe: vl.Recipe, seed: int) -> dict[str, Any]:
    """Return the options that all methods train with: the rank of the shift, or as many entries."""
    fields = vl.get_method(recipe.method).config.__dataclass_fields__
    density = RANK * (WIDTH + HIDDEN) / (WIDTH * HIDDEN)
    usual = {"rank": RANK, "density": density, **recipe.options, "seed": seed}
    return {key: value for key, value in usual.items() if key in fields}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()
