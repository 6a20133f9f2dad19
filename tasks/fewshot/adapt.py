"""Training an injected adapter on the shots: batches, start, optimiser, schedule."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import visionlora as vl
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.experiment import Experiment
from tasks.fewshot.frozen import start_head
from tasks.fewshot.recipe import ADAM_BETAS, ETA_MIN, WEIGHT_DECAY
from tasks.fewshot.shots import Batches, FeatureBatches, Shots
from visionlora.dynamics import Dynamics
from visionlora.training import FitResult, RunDirectory, TrainSettings, cosine, fit


def adapt(
    experiment: Experiment,
    seed: int,
    shots: Shots,
    directory: RunDirectory,
    dynamics: Sequence[Dynamics] = (),
) -> tuple[FitResult, int]:
    """Train the injected adapter on the shots, and return how many scalars that trained."""
    config, transform = experiment.config, experiment.backbone.transform
    model = experiment.classifier(experiment.trained_classes)
    batches = Batches(shots, transform.size, config.batch_size, config.augmentation, seed)
    source: Callable[[int], tuple[Tensor, Tensor]] = batches
    start_head(experiment, model, seed, shots)
    model.train()
    if config.encoder == "vision":
        model.cache_text()
    elif config.encoder == "text":
        model.clip.visual.eval()
        source = FeatureBatches(batches, _frozen_features(model, shots))
    assert config.lr is not None
    assert not isinstance(config.lr, str)
    assert config.steps is not None
    _initialise(experiment, model, source)
    clip = experiment.backbone.clip
    trainable = sum(parameter.numel() for _, parameter in vl.trainable_parameters(clip))
    groups = vl.parameter_groups(clip, config.lr, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS)
    settings = TrainSettings(
        steps=config.steps,
        precision=config.precision,
        checkpoint_every=config.checkpoint_every,
        seed=seed,
        device=config.device,
    )
    fitted = fit(
        model,
        optimizer,
        classification_loss,
        source,
        settings,
        directory,
        dynamics=[*config.recipe.build_dynamics(model, optimizer, config.steps), *dynamics],
        schedule=cosine(config.steps, floor=min(1.0, ETA_MIN / config.lr)),
    )
    model.eval()
    return fitted, trainable


def _initialise(
    experiment: Experiment, model: Classifier, source: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    """Give the adapter the start of the recipe; a resumed run takes it back from its checkpoint."""
    config = experiment.config
    init = config.recipe.init
    if init is None:
        return
    batches = (
        tuple(item.to(experiment.device) for item in source(step))
        for step in range(config.init_batches or 0)
    )
    vl.initialise(model, init, batches if init.needs else None, classification_loss)


def classification_loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


@torch.no_grad()
def _frozen_features(model: Classifier, shots: Shots) -> Tensor:
    """Return the features of the training images, which a frozen vision tower never changes."""
    device = model.mean.device
    batches = [torch.stack(shots.images[i : i + 64]) for i in range(0, len(shots.images), 64)]
    return torch.cat([model.image_features(batch.to(device)).cpu() for batch in batches])
