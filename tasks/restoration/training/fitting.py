"""The training that pre-training and adaptation share: AdamW, a half cosine, the shared loop."""

from collections.abc import Sequence

import torch
from torch import nn

import visionlora as vl
from tasks.restoration.pairs.samples import Batches
from tasks.restoration.training.config import RunConfig
from tasks.restoration.training.losses import loss_of, train_psnr
from visionlora.compose import Recipe
from visionlora.dynamics import Dynamics
from visionlora.training import FitResult, RunDirectory, TrainSettings, fit
from visionlora.training.schedules import cosine

MAY_CHANGE = (
    *("output", "resume", "overwrite", "device", "checkpoint_every", "keep_checkpoints", "workers"),
)
"""Settings that may differ when a run is resumed: none of them changes a patch."""


def train(
    model: nn.Module,
    config: RunConfig,
    batches: Batches,
    directory: RunDirectory,
    *,
    steps: int,
    rate: float,
    floor: float,
    seed: int,
    recipe: Recipe | None = None,
    dynamics: Sequence[Dynamics] = (),
) -> FitResult:
    """Train what is not frozen, in place.

    Args:
        model: the network.
        config: sizes, loss and optimiser.
        batches: patches by micro-step.
        directory: where log and checkpoints go.
        steps: length.
        rate: learning rate of the first step.
        floor: learning rate after the last one.
        seed: of random numbers drawn while training.
        recipe: method whose dynamics act.
        dynamics: further callbacks, after those of the recipe.
    """
    groups = vl.parameter_groups(model, lr=rate, weight_decay=config.weight_decay)
    first, second = config.betas
    optimizer = torch.optim.AdamW(groups, betas=(first, second))
    own = recipe.build_dynamics(model, optimizer, steps) if recipe else []
    return fit(
        model.train(),
        optimizer,
        loss_of(config.loss),
        batches,
        TrainSettings(
            steps=steps,
            accumulate=config.accumulate,
            precision=config.precision,
            clip_norm=config.clip_norm,
            checkpoint_every=config.interval(steps),
            keep_checkpoints=config.keep_checkpoints,
            seed=seed,
            device=config.device,
        ),
        directory,
        dynamics=[*own, *dynamics],
        schedule=cosine(steps, floor=min(1.0, floor / rate)),
        figures=lambda loss: train_psnr(config.loss, loss),
    )
