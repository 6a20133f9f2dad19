"""The command `contribution`: how much every layer has to do with a task.

    probe      a copy of the base is tuned as a whole for a few steps and thrown away after
    scores     attribution of the way from base to probe, mean over the weights of a layer

scores.json    mean score of every parameter tensor, and the base they belong to
scores.png     bars in the order of the network, and the means of biases, norms and scales

The measure is FAIG, as CoLoRA uses it (Park et al. 2024, arXiv 2408.01099); that the second end of
the path is a short probe, its length, and 16 points are derived: the paper's values are not known.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tasks.restoration.networks.files import Base, load_base
from tasks.restoration.pairs.layouts import AUTO
from tasks.restoration.pairs.samples import Batch, Batches, Samples
from tasks.restoration.pairs.sources import load_source
from tasks.restoration.parameters import table_by_kind
from tasks.restoration.training.losses import l1_loss, squared_error
from visionlora.analysis import attribute, magnitude, sensitivity
from visionlora.errors import ConfigError, DataError
from visionlora.io.atomic import write_text_atomically
from visionlora.training import Progress, RunDirectory
from visionlora.training.device import pick_device
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/restoration")
Kind = Literal["faig", "grad", "magnitude"]
CPU = torch.device("cpu")
FIRST_IMAGE = 10_000_000
"""Number of the first sample on which scores are taken: none that training sees."""


@dataclass(frozen=True)
class Probe:
    """How contributions are measured."""

    kind: Kind = "faig"
    steps: int = 40
    batch_size: int = 8
    lr: float = 4e-4
    points: int = 16
    images: int = 16


@dataclass(frozen=True, kw_only=True)
class ContributionConfig:
    """Measure the contribution of every layer to a task."""

    base: str = "tiny"
    """tiny or a file."""
    data: str
    """Folder of pairs, or TASK:FOLDER of clean pictures."""
    layout: str = AUTO
    """How pairs lie in the folder."""
    kind: Kind = "faig"
    """faig; grad (gradient times weight, no probe) or magnitude (how far the probe moves)."""
    probe_steps: int = 40
    """Steps of the probe."""
    points: int = 16
    """Points on the path from base to probe."""
    images: int = 16
    """Patches on which scores are taken."""
    patch: int = 64
    """Side of the patches."""
    seed: int = 0
    """Seed of the patches."""
    output: str | None = None
    """Run folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    resume: bool = False
    """Write into the same folder again."""
    overwrite: bool = False
    """Replace what is in the folder."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("probe_steps", "points", "images", "patch"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, name)}")


def run(config: ContributionConfig) -> dict[str, Any]:
    """Measure, write and draw the scores, and return what is written to result.json."""
    from tasks.restoration.contribution_picture import draw_scores

    base = load_base(config.base)
    _refuse_asleep(base.model)
    device = pick_device(config.device)
    samples = Samples(load_source(config.data, layout=config.layout), config.patch, config.seed)
    default = RUNS / "contribution"
    directory, made = open_run(
        config.output, default, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config)
    probe = Probe(config.kind, config.probe_steps, points=config.points, images=config.images)
    scores = measure(base, samples, probe, device)
    path = write_scores(directory.path / "scores.json", scores, base)
    draw_scores(scores, base.model, directory.path / "scores.png")
    print(table_by_kind(scores, base.model))
    top = sorted(scores, key=lambda name: -scores[name])[:5]
    print(f"largest contributions: {', '.join(top)}")
    print(f"scores: {path}")
    return _result(directory, config, base, scores)


def measure(
    base: Base, samples: Samples, probe: Probe, device: torch.device = CPU
) -> dict[str, float]:
    """Return the mean score of every parameter tensor; the base stays as it is.

    Raises:
        ConfigError: a network whose blocks are switched off, so that nothing can be attributed.
    """
    _refuse_asleep(base.model)
    model = copy.deepcopy(base.model).eval().to(device)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = (_one(samples, FIRST_IMAGE + number, device) for number in range(probe.images))
    if probe.kind == "grad":
        found = sensitivity(model, images, squared_error)
    else:
        _tune(model, samples, probe, device)
        end = {name: p.detach().clone() for name, p in model.named_parameters()}
        if probe.kind == "magnitude":
            found = magnitude(start, end)
        else:
            found = attribute(model, start, end, images, squared_error, points=probe.points)
    return {name: float(score.mean()) for name, score in found.items()}


def write_scores(path: Path, scores: Mapping[str, float], base: Base) -> Path:
    """Write scores with the base they belong to."""
    said = {"base": base.name, "digest": base.digest, "scores": dict(scores)}
    return write_text_atomically(path, json.dumps(said, indent=1) + "\n")


def read_scores(path: Path, base: Base) -> dict[str, float]:
    """Return the score of every layer, by the layer's name.

    Raises:
        DataError: the file cannot be read.
        ConfigError: the scores are of another network.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        scores = {str(name): float(value) for name, value in said["scores"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"cannot read the scores {path}: {error}") from error
    names = {name for name, _ in base.model.named_parameters()}
    if set(scores) != names:
        raise ConfigError(f"{path} has the scores of another network than {base.name}")
    return {
        name.removesuffix(".weight"): value
        for name, value in scores.items()
        if name.endswith(".weight")
    }


def _tune(model: nn.Module, samples: Samples, probe: Probe, device: torch.device) -> None:
    """Tune everything for a few steps."""
    batches = Batches(samples, probe.batch_size)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), probe.lr, betas=(0.9, 0.9), weight_decay=0.0)
    with Progress(probe.steps, "probe") as progress:
        for step in range(probe.steps):
            batch = _on(device, batches(step))
            loss = l1_loss(model(batch.input), batch.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(step + 1, float(loss.detach()), probe.lr)


def _one(samples: Samples, number: int, device: torch.device) -> Batch:
    """Return one sample as a batch."""
    pair = (torch.from_numpy(half).permute(2, 0, 1)[None].contiguous() for half in samples(number))
    return _on(device, Batch(*pair))


def _on(device: torch.device, batch: Batch) -> Batch:
    return Batch(*(part.to(device) for part in batch))


def _refuse_asleep(model: nn.Module) -> None:
    """Refuse a fresh NAFNet: while beta and gamma are zero, no conv of a block has a gradient."""
    gates = [p for name, p in model.named_parameters() if name.endswith((".beta", ".gamma"))]
    if gates and not any(bool(gate.any()) for gate in gates):
        raise ConfigError(
            "beta and gamma of this NAFNet are zero, so its blocks do nothing and have no "
            "contribution: pre-train it first"
        )


def _result(
    directory: RunDirectory, config: ContributionConfig, base: Base, scores: Mapping[str, float]
) -> dict[str, Any]:
    return directory.write_result(
        {
            "task": "restoration",
            "base": base.name,
            "data": config.data,
            "kind": config.kind,
            "layers": len(scores),
            "largest": max(scores.values()),
        }
    )
