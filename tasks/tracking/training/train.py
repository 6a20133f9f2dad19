"""The command `train`: a tracker learns from pairs of frames.

config.yaml, log.jsonl, checkpoints/    as every run has them
adapter.safetensors                     what was trained, in this project's format
lorat.safetensors                       the same in LoRAT's, where that can hold it
result.json                             loss, IoU on training pairs, counts, time
"""

import re
import time
from pathlib import Path
from typing import Any

import torch

import visionlora as vl
from tasks.tracking.model.build import build
from tasks.tracking.model.export import write_released
from tasks.tracking.model.lorat import LoRAT
from tasks.tracking.model.variants import find_variant
from tasks.tracking.training.augment import Augmentation
from tasks.tracking.training.batches import Batches, collate
from tasks.tracking.training.config import MIN_LR, WARMUP_LR, TrainConfig
from tasks.tracking.training.data import load_source
from tasks.tracking.training.objective import pair_loss, pair_overlap
from tasks.tracking.training.optimizer import build_optimizer, prefixed_cosine
from tasks.tracking.training.samples import Batch, Samples
from visionlora.errors import ConfigError
from visionlora.training import FitResult, RunDirectory, TrainSettings, fit
from visionlora.training.device import pick_device
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/tracking")
MAY_CHANGE = (
    *("output", "resume", "overwrite", "device", "root", "workers"),
    *("checkpoint_every", "keep_checkpoints"),
)
"""Settings that may differ when a run is resumed: none of them changes a batch."""
MEASURED = 64
"""Training pairs on which the finished tracker is measured."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Carry out a training and return what is written to its result.json.

    Raises:
        VisionLoraError: a setting, data or a file that cannot be used.
    """
    began = time.monotonic()
    config = config.resolved()
    variant = find_variant(config.tracker)
    device = pick_device(config.device)
    source = load_source(config.data, config.root, config.data_weights, variant.shape)
    augmentation = Augmentation(config.third_augment)
    samples = Samples(source, variant.shape, config.seed, augmentation, config.reach, config.spread)
    batches = Batches(
        samples,
        config.batch_size // config.accumulate,
        workers=config.workers,
        fixed=config.fixed_pairs,
    )
    model = build_model(config)
    batches.numbers(0)  # refuses a batch that cannot be shared by the processes
    samples(0)  # refuses data of which nothing can be used
    default = RUNS / re.sub(r"[^A-Za-z0-9]+", "-", f"train-{config.tracker}-{config.method}")
    directory, made = open_run(
        config.output, default, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config, volatile=MAY_CHANGE)
    trainable = sum(p.numel() for _, p in vl.trainable_parameters(model))
    if directory.main:
        for note in source.notes:
            print(note, flush=True)
        print(f"{config.tracker}: {trainable:,} trainable parameters, {config.method}", flush=True)
    try:
        fitted = train(model, config, batches, directory, device)
        model.eval()
        iou = measure(model, samples, config, device)
    finally:
        batches.close()
    files = save(model, config, directory.path) if directory.main else []
    result = directory.write_result(
        {
            "task": "tracking",
            "tracker": config.tracker,
            "method": config.method,
            "data": config.data,
            "steps": fitted.steps,
            "pairs": fitted.steps * config.batch_size,
            "loss": fitted.loss,
            "train_iou": iou,
            "skipped_steps": fitted.skipped,
            "unusable_draws": batches.unusable.total(),
            "trainable_parameters": trainable,
            "parameters": sum(p.numel() for p in model.parameters()),
            "step_seconds": fitted.step_seconds,
            "seconds": round(time.monotonic() - began, 3),
            "files": [file.name for file in files],
        }
    )
    if directory.main:
        _report(result, batches, directory.path)
    return result


def build_model(config: TrainConfig) -> LoRAT:
    """Return the tracker of a run, frozen but for what it trains."""
    return build(
        config.tracker,
        method=config.method if config.recipe else None,
        weights=config.weights,
        backbone_weights=config.backbone_weights,
        pos_mode=config.pos_mode,
        seed=config.seed,
        lean=config.lean,
        **config.adapter,
    )


def train(
    model: LoRAT,
    config: TrainConfig,
    batches: Batches,
    directory: RunDirectory,
    device: torch.device,
) -> FitResult:
    """Train what is not frozen, in place.

    Args:
        model: a tracker with its adapter.
        config: resolved settings.
        batches: what it is trained on.
        directory: where log and checkpoints go.
        device: where a start that looks at data is computed.
    """
    assert config.steps is not None
    assert config.warmup_steps is not None
    assert config.checkpoint_every is not None
    model.to(device).train()
    recipe = config.recipe
    # Weights to start from are a start of their own.
    if config.looks_at_data and config.weights is None:
        assert recipe is not None
        assert recipe.init is not None
        seen = (_to(batches(step), device) for step in range(config.init_batches or 0))
        vl.initialise(model, recipe.init, seen, pair_loss)
    optimizer = build_optimizer(model, config.lr, config.weight_decay)
    return fit(
        model,
        optimizer,
        pair_loss,
        batches,
        TrainSettings(
            steps=config.steps,
            accumulate=config.accumulate,
            precision=config.precision,
            clip_norm=config.clip_norm,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            seed=config.seed,
            device=config.device,
        ),
        directory,
        dynamics=recipe.build_dynamics(model, optimizer, config.steps) if recipe else (),
        schedule=prefixed_cosine(
            config.steps,
            warmup=config.warmup_steps,
            start=min(1.0, WARMUP_LR / config.lr),
            floor=min(1.0, MIN_LR / config.lr),
        ),
    )


def measure(model: LoRAT, samples: Samples, config: TrainConfig, device: torch.device) -> float:
    """Return the mean IoU on the first training pairs, of the box with the highest score."""
    count = min(MEASURED, config.fixed_pairs or MEASURED)
    size = min(count, config.batch_size)
    found = []
    for start in range(0, count, size):
        rows = [samples(number) for number in range(start, min(start + size, count))]
        found.append(pair_overlap(model, _to(collate(rows), device)))
    return round(float(torch.cat(found).mean()), 4)


def save(model: LoRAT, config: TrainConfig, folder: Path) -> list[Path]:
    """Write what was trained, in every format that can hold it, and return the files."""
    files = []
    if config.recipe is not None:
        files.append(vl.save(model, folder / "adapter.safetensors"))
    try:
        files.append(write_released(model, folder / "lorat.safetensors"))
    except ConfigError:
        # LoRAT's format holds plain LoRA on every layer; the first file has the others.
        if not files:
            raise
    return files


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(part.to(device) for part in batch))


def _report(result: dict[str, Any], batches: Batches, folder: Path) -> None:
    """Say how the run ended."""
    print(
        f"{result['steps']} steps, {result['pairs']:,} pairs: loss {result['loss']:.3f}, IoU "
        f"{result['train_iou']:.3f} on training pairs, {result['step_seconds']:.3f} s per step"
    )
    if result["skipped_steps"]:
        print(f"note: {result['skipped_steps']} steps were skipped, being not finite")
    if batches.unusable:
        (reason, _), *_ = batches.unusable.most_common(1)
        print(f"note: {batches.unusable.total()} draws were given up, most often: {reason}")
    print(f"result: {folder / 'result.json'}")
