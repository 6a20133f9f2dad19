"""The command `adapt`: a base network learns one task, by few of its parameters.

config.yaml, log.jsonl, checkpoints/    as every run has them
adapter.safetensors, adapter.json       see adapter_folder.py
scores.json                             contributions, where a probe found them for this run
result.json                             trained parameters, held-out figures, time
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import visionlora as vl
from tasks.restoration.contribution import Probe, measure, read_scores, write_scores
from tasks.restoration.networks.files import Base, load_base
from tasks.restoration.pairs.samples import Batches, Samples
from tasks.restoration.training.adapter_folder import Card, save_adapter
from tasks.restoration.training.config import AdaptConfig
from tasks.restoration.training.fitting import MAY_CHANGE, train
from tasks.restoration.training.held_out import Parts, load_parts, measured, untouched
from tasks.restoration.training.losses import loss_of, train_psnr
from tasks.restoration.training.methods import COLORA, LORA, recipe_of
from tasks.restoration.training.tuned import Tuned, tune
from tasks.restoration.training.validation import Say, Validation
from visionlora.compose import Recipe
from visionlora.errors import ConfigError
from visionlora.registry import get_method
from visionlora.training import FitResult, RunDirectory, process
from visionlora.training.device import pick_device
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/restoration")
SCORES = "scores.json"
MIN_LR = 1e-6
INIT_BATCHES = 8
"""Training batches that a start which looks at data is given."""


def run(config: AdaptConfig, say: Say = print) -> dict[str, Any]:
    """Carry out an adaptation and return what is written to its result.json.

    Args:
        config: the settings.
        say: prints a line.

    Raises:
        VisionLoraError: a setting, data or a file that cannot be used.
    """
    began = time.monotonic()
    device = pick_device(config.device)
    base = load_base(config.base, config.seed)
    parts = load_parts(config)
    samples = Samples(parts.train, config.patch, config.seed)
    batches = Batches(samples, config.batch_size // config.accumulate, workers=config.workers)
    batches.numbers(0)  # refuses a batch that cannot be shared by the processes
    default = RUNS / re.sub(r"[^A-Za-z0-9]+", "-", f"adapt-{config.task}-{config.method}")
    directory, made = open_run(
        config.output, default, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config, volatile=MAY_CHANGE)
        before = _before(base, parts, config)
        tuned = _tuned(base, config, samples, directory)
    if not directory.main:
        say = _silent
    for line in _announced(base, parts, config, tuned):
        say(line)
    try:
        fitted, validation = _train(base, config, batches, directory, parts, say)
    finally:
        batches.close()
    found = _after(base, parts, config, validation, before)
    score = config.score if config.method == COLORA and config.scores is None else config.scores
    card = Card(
        task=config.task,
        method=config.method,
        base=base.name,
        digest=base.digest,
        trainable=tuned.trainable,
        parameters=tuned.parameters,
        budget=config.budget if _has_budget(config) else None,
        score=score if config.method == COLORA else None,
        ranks=dict(tuned.ranks) or None,
        dense=sorted(tuned.dense) or None,
        parts=parts.names,
    )
    size = save_adapter(base, card, directory.path).stat().st_size if directory.main else 0
    result = directory.write_result(
        {
            "task": config.task,
            "base": base.name,
            "method": config.method,
            "data": config.data,
            "images": len(parts.train),
            "seed": config.seed,
            "lr": config.rate,
            "steps": fitted.steps,
            "loss": fitted.loss,
            **train_psnr(config.loss, fitted.loss),
            **found,
            "trainable_parameters": tuned.trainable,
            "trainable_percent": round(tuned.percent, 4),
            "parameters": tuned.parameters,
            "adapter_bytes": size,
            "skipped_steps": fitted.skipped,
            "device": str(device),
            "step_seconds": fitted.step_seconds,
            "seconds": round(time.monotonic() - began, 3),
        }
    )
    for line in _reported(result, directory.path):
        say(line)
    return result


def _tuned(base: Base, config: AdaptConfig, samples: Samples, directory: RunDirectory) -> Tuned:
    """Make the network trainable, once contributions are known if they are needed."""
    scores: Mapping[str, float] | None = None
    if config.method == COLORA:
        scores = _scores(base, config, samples, directory)
    return tune(
        *(base, config.method, config.adapter),
        scores=scores,
        budget=config.budget,
        gamma=config.gamma,
        beta=config.beta,
        least=config.least,
        extras=config.extras,
        seed=config.seed,
    )


def _scores(
    base: Base, config: AdaptConfig, samples: Samples, directory: RunDirectory
) -> dict[str, float]:
    """Return the contribution of every layer, by a file or by a probe whose result is kept."""
    if config.scores is not None:
        return read_scores(Path(config.scores).expanduser(), base)
    path = directory.path / SCORES
    if not (config.resume and path.is_file()):
        if process()[1] > 1:
            raise ConfigError(
                "a run of several processes takes contributions from a file: run `contribution` "
                "first and give --scores"
            )
        probe = Probe(
            kind=config.score,
            steps=config.probe_length,
            batch_size=config.batch_size,
            points=config.points,
            images=config.probe_patches,
        )
        write_scores(path, measure(base, samples, probe), base)
    return read_scores(path, base)


def _train(
    base: Base,
    config: AdaptConfig,
    batches: Batches,
    directory: RunDirectory,
    parts: Parts,
    say: Say,
) -> tuple[FitResult, Validation | None]:
    """Train in place, and leave the weights that were best on the validation pictures."""
    recipe = recipe_of(config.method)
    if recipe is not None and recipe.init is not None and recipe.init.needs:
        first = (batches(step) for step in range(INIT_BATCHES))
        vl.initialise(base.model, recipe.init, first, loss_of(config.loss))
    validation = None
    if parts.validation:
        validation = Validation(
            *(base.model, parts.validation, config.val_interval, config.steps),
            keep=_keeps_its_parameters(recipe),
            directory=directory,
            say=say,
        )
    fitted = train(
        *(base.model, config, batches, directory),
        steps=config.steps,
        rate=config.rate,
        floor=MIN_LR,
        seed=config.seed,
        recipe=recipe,
        dynamics=[validation] if validation else [],
    )
    if validation is not None:
        validation.restore_best()
    return fitted, validation


def _keeps_its_parameters(recipe: Recipe | None) -> bool:
    """Whether earlier weights can be put back: not where ranks or constants change meanwhile."""
    return recipe is None or (not recipe.dynamics and get_method(recipe.method).controller is None)


def _before(base: Base, parts: Parts, config: AdaptConfig) -> dict[str, float]:
    """Return the figures of held-out pictures as they are, and of the base alone."""
    device = pick_device(config.device)
    found: dict[str, float] = {}
    for part, examples in (("val", parts.validation), ("test", parts.test)):
        if examples:
            for what, figures in (
                ("input", untouched(examples)),
                ("base", measured(base.model, examples, device)),
            ):
                found[f"{part}_psnr_{what}"] = round(figures.psnr, 4)
                found[f"{part}_ssim_{what}"] = round(figures.ssim, 4)
    return found


def _after(
    base: Base,
    parts: Parts,
    config: AdaptConfig,
    validation: Validation | None,
    before: Mapping[str, float],
) -> dict[str, Any]:
    """Return the figures of the trained network beside those before."""
    found: dict[str, Any] = {}
    if validation is not None:
        found |= {"val_psnr": round(validation.psnr, 4), "best_step": validation.step}
    if parts.test:
        figures = measured(base.model, parts.test, pick_device(config.device))
        found |= {"test_psnr": round(figures.psnr, 4), "test_ssim": round(figures.ssim, 4)}
    return {**found, **before}


def _has_budget(config: AdaptConfig) -> bool:
    return config.method == COLORA or (config.method == LORA and "rank" not in config.adapter)


def _announced(base: Base, parts: Parts, config: AdaptConfig, tuned: Tuned) -> list[str]:
    """Say what is trained on what, layer by layer where there are ranks."""
    held = f"{len(parts.validation)} to validate, {len(parts.test)} to test"
    lines = [f"{parts.train.notes[0]} to train on, {held}", *parts.train.notes[1:]]
    if tuned.ranks:
        width = max(map(len, tuned.ranks))
        lines += [
            f"  {name:<{width}}  {'whole' if name in tuned.dense else rank or 'frozen'}"
            for name, rank in tuned.ranks.items()
        ]
    lines.append(
        f"{config.method} trains {tuned.trainable:,} of {tuned.parameters:,} parameters of "
        f"{base.name}, {tuned.percent:.1f} %"
    )
    return lines


def _reported(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Say how the run ended."""
    lines = []
    if "val_psnr" in result:
        lines.append(
            f"validation: {result['val_psnr']:.2f} dB at step {result['best_step']}, input "
            f"{result['val_psnr_input']:.2f}, base {result['val_psnr_base']:.2f}"
        )
        if result["val_psnr"] < result["val_psnr_input"]:
            lines.append("warning: the network makes the validation pictures worse than they were")
    if "test_psnr" in result:
        lines.append(
            f"test: {result['test_psnr']:.2f} dB, SSIM {result['test_ssim']:.4f}, input "
            f"{result['test_psnr_input']:.2f}, base {result['test_psnr_base']:.2f}"
        )
    if result["skipped_steps"]:
        lines.append(f"note: {result['skipped_steps']} steps were skipped, being not finite")
    lines.append(f"adapter: {folder}, {result['adapter_bytes'] / 1000:,.0f} kB")
    return lines


def _silent(_: str) -> None:
    """Print nothing: another process does."""
