"""Teach tiny-vit the dense features of EfficientNet-Lite0 on crops of photographs.

    loss = mean over patches and channels of (head(student(x)) - (teacher(x) - mean) / std)^2

The mean and std of every teacher channel are taken over crops beforehand, and `head` is one linear
layer that is used here only (features as targets: Romero et al. 2015, "FitNets", arXiv 1412.6550).
Steps alternate between small crops (a template's size), which lie anywhere on the grid of
positions, and crops of the whole grid (a search region's size), with the same number of patches.
Learning rates fall at the end of a run only, over its share `decay`: a run without a fall may be
stopped and continued at any time, and one that starts from its weights ends it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tasks.shared.tiny_vit.crops import Crops
from tasks.shared.tiny_vit.model import MEAN, PATCH, STD, TinyViT
from tasks.shared.tiny_vit.photographs import Photographs
from tasks.shared.tiny_vit.teacher import CHANNELS, Teacher
from visionlora.errors import ConfigError, DataError
from visionlora.training import FitResult, RunDirectory, TrainSettings, fit, process, shard
from visionlora.training.checkpoint import CheckpointStore
from visionlora.training.schedules import Schedule

SMALL = 8
"""Patches per side of a small crop."""
MEASURED = 256
"""Crops over which the teacher's channels are measured."""


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """Settings of a run."""

    photographs: Path
    """Folder with prepared photographs."""
    output: Path
    """Folder of the run."""
    steps: int = 5000
    """Optimiser steps."""
    batch: int = 64
    """Small crops per step; of large ones there are fewer, with as many patches."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.05
    """Weight decay of matrices."""
    warmup: int = 100
    """Steps of linear rise."""
    decay: float = 1.0
    """Share of the steps after the rise over which the learning rate falls to 0, at the end."""
    initial: Path | None = None
    """Folder of an earlier run to start from the weights of."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights and crops."""
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay is a share from 0 to 1, got {self.decay}")


class Student(nn.Module):
    """tiny-vit with batch norms in its stem, and the head to the teacher's channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, **shape: int) -> None:
        super().__init__()
        self.vit = TinyViT(norm=True, **shape)
        self.head = nn.Linear(self.vit.embed_dim, CHANNELS)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], top: int | None = None, left: int | None = None
    ) -> Float[Tensor, "b n c"]:
        """Return the teacher's standardised features as the student guesses them."""
        guess: Tensor = self.head(self.vit.features((pixels - self.mean) / self.std, top, left))
        return guess


class Lesson(NamedTuple):
    """What a step learns from."""

    pixels: Float[Tensor, "b 3 h w"]
    target: Float[Tensor, "b n c"]
    top: int
    left: int


class Lessons:
    """Batches of crops with what the teacher says, as a pure function of the step."""

    def __init__(
        self, crops: Crops, teacher: nn.Module, batch: int, grid: int, small: int = SMALL
    ) -> None:
        per_large = (grid // small) ** 2
        if batch % per_large:
            raise ConfigError(f"batch must be a multiple of {per_large}, got {batch}")
        self.crops, self.teacher, self.grid, self.small = crops, teacher, grid, small
        self.counts = {small: batch, grid: batch // per_large}
        self.batch = batch
        self.mean, self.std = self._channels()

    def __call__(self, step: int) -> Lesson:
        """Return the lesson of a step: small crops and large ones take turns."""
        patches = self.small if step % 2 == 0 else self.grid
        first = MEASURED + step * self.batch  # numbers of large crops are skipped, not repeated
        numbers = shard(range(first, first + self.counts[patches]), *process())
        pixels = self.crops.batch(numbers, patches * PATCH)
        room = self.grid - patches + 1
        place = torch.Generator().manual_seed(first)
        top, left = torch.randint(room, (2,), generator=place).tolist()
        return Lesson(pixels, (self.teacher(pixels) - self.mean) / self.std, top, left)

    def _channels(self) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
        """Return mean and standard deviation of the teacher's channels."""
        maps = [
            self.teacher(
                self.crops.batch(list(range(n, min(n + 64, MEASURED))), self.small * PATCH)
            )
            for n in range(0, MEASURED, 64)
        ]
        flat = torch.cat(maps).flatten(0, 1)
        return flat.mean(0), flat.std(0).clamp(min=1e-6)


MAY_CHANGE = ("output", "resume", "overwrite", "checkpoint_every")
"""Settings that may differ when a run is resumed."""


def distil(config: DistilConfig) -> FitResult:
    """Train a student; the checkpoints in the folder of the run hold it.

    Raises:
        DataError: no photographs, or `initial` is no run of a student.
        OutputError: the folder holds another run, or cannot be written.
    """
    run = RunDirectory(config.output, config.resume, overwrite=config.overwrite)
    run.write_config(config, volatile=MAY_CHANGE)
    torch.manual_seed(config.seed)
    student = Student() if config.initial is None else trained(config.initial)[0].train()
    crops = Crops(Photographs(config.photographs), config.seed)
    grid = student.vit.patch_embed.grid_size[0]
    lessons = Lessons(crops, Teacher(), config.batch, grid)
    settings = TrainSettings(
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        clip_norm=1.0,
        seed=config.seed,
        device="cpu",
    )
    optimizer = torch.optim.AdamW(
        groups(student, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), fused=True
    )
    schedule = trapezoid(config.steps, config.warmup, config.decay)
    result = fit(student, optimizer, loss_of, lessons, settings, run, schedule=schedule)
    run.write_result({"task": "distil tiny-vit", "loss": result.loss, "steps": result.steps})
    return result


def loss_of(model: nn.Module, lesson: Lesson) -> Tensor:
    """Return the mean squared error of a lesson."""
    guess = model(lesson.pixels, lesson.top, lesson.left)
    return nn.functional.mse_loss(guess, lesson.target)


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices decay, vectors and positions do not."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[parameter.ndim > 1 and "pos_embed" not in name].append(parameter)
    return [
        {"params": parts[True], "weight_decay": decay},
        {"params": parts[False], "weight_decay": 0.0},
    ]


def trapezoid(steps: int, warmup: int, decay: float) -> Schedule:
    """Return a multiplier that rises linearly, stays at 1, and falls along a line to 0."""
    fall = max(1, round((steps - warmup) * decay)) if decay else 0

    def multiplier(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return min(rise, (steps - step) / fall) if fall else rise

    return multiplier


@torch.no_grad()
def trained(run: Path) -> tuple[Student, int]:
    """Return the student of a run, finished or not, and its number of steps.

    Raises:
        DataError: the folder holds no checkpoint of a student.
    """
    checkpoint = CheckpointStore(run / "checkpoints").newest()
    if checkpoint is None:
        raise DataError(f"{run} holds no checkpoint of a student")
    kept = checkpoint.shared()["trained"]
    student = Student()
    own = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for name, value in {**kept["parameters"], **kept["buffers"]}.items():
        if name not in own or own[name].shape != value.shape:
            raise DataError(f"{run} is the run of something else: it has {name}")
        own[name].copy_(value)
    return student.eval(), checkpoint.step
