"""The command `pretrain`: a network learns to undo mixed degradations.

config.yaml, log.jsonl, checkpoints/    as every run has them
base.safetensors                        the network, with what it was trained on
result.json                             loss, counts, time
"""

import re
import time
from pathlib import Path
from typing import Any

from tasks.restoration.degradations.prod import Prod
from tasks.restoration.images import pictures_below
from tasks.restoration.networks.catalogue import find_network
from tasks.restoration.networks.files import RANDOM, load_base, save_base
from tasks.restoration.pairs.samples import Batches, Samples
from tasks.restoration.pairs.sources import Clean
from tasks.restoration.training.config import PretrainConfig
from tasks.restoration.training.fitting import MAY_CHANGE, train
from tasks.restoration.training.losses import train_psnr
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/restoration")
BASE = "base.safetensors"
MIN_LR = 1e-7
"""Of NAFNet's recipe."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Carry out a pre-training and return what is written to its result.json.

    Raises:
        VisionLoraError: a setting, data or a file that cannot be used.
    """
    began = time.monotonic()
    files = [file for folder in config.clean for file in pictures_below(folder)]
    degradation = Prod(config.mode, config.most, config.identity, config.patch)
    source = Clean(files, degradation, config.mode)
    samples = Samples(source, config.patch, config.seed)
    batches = Batches(samples, config.batch_size // config.accumulate, workers=config.workers)
    batches.numbers(0)  # refuses a batch that cannot be shared by the processes
    model = load_base(f"{config.net}{RANDOM}", config.seed).model
    parameters = sum(p.numel() for p in model.parameters())
    default = RUNS / re.sub(r"[^A-Za-z0-9]+", "-", f"pretrain-{config.net}-{config.mode}")
    directory, made = open_run(
        config.output, default, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config, volatile=MAY_CHANGE)
    if directory.main:
        print(f"{config.net}: {parameters:,} parameters", *source.notes, sep="\n", flush=True)
    try:
        fitted = train(
            *(model, config, batches, directory),
            steps=config.steps,
            rate=config.lr,
            floor=MIN_LR,
            seed=config.seed,
        )
    finally:
        batches.close()
    facts = {
        "net": config.net,
        "mode": config.mode,
        "steps": fitted.steps,
        "patches": fitted.steps * config.batch_size,
        "pictures": len(source),
        "loss": fitted.loss,
    }
    if directory.main:
        path = save_base(model, find_network(config.net), directory.path / BASE, **facts)
        if fitted.skipped:
            print(f"note: {fitted.skipped} steps were skipped, being not finite")
        print(f"{fitted.steps} steps, {config.loss} loss {fitted.loss:.4f}; base: {path}")
    return directory.write_result(
        {
            "task": "restoration",
            **facts,
            **train_psnr(config.loss, fitted.loss),
            "parameters": parameters,
            "skipped_steps": fitted.skipped,
            "step_seconds": fitted.step_seconds,
            "seconds": round(time.monotonic() - began, 3),
        }
    )
