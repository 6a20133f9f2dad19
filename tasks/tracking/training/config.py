"""Settings of a training run, LoRAT's unless said otherwise."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.tracking.geometry.jitter import REACH, SCALE_STD
from tasks.tracking.model.build import METHOD
from tasks.tracking.model.embedding import PosMode
from tasks.tracking.model.variants import find_variant
from tasks.tracking.training.data import split_spec
from visionlora.compose import Recipe, parse
from visionlora.errors import ConfigError
from visionlora.registry import get_method

NONE = "none"
"""`--method none`: token types and head alone."""
WARMUP_EPOCHS = 2
WARMUP_SHARE = 10
"""A warm-up takes at most this fraction of the steps."""
CHECKPOINT_EPOCHS = 10
WARMUP_LR, MIN_LR = 1e-7, 1e-6
INIT_BATCHES = 8
AT_LEAST_ONE = (
    *("epochs", "epoch_pairs", "steps", "batch_size", "accumulate", "fixed_pairs"),
    *("init_batches", "keep_checkpoints"),
)
NOT_NEGATIVE = ("warmup_steps", "checkpoint_every", "workers", "seed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a tracker on pairs of frames."""

    tracker: str = "tiny"
    """tiny, lorat-b-224, lorat-b-378, lorat-l-224, lorat-l-378, lorat-g-224, lorat-g-378, ..."""
    backbone_weights: str | None = None
    """Frozen weights of lorat-*: hub (the default), a file of DINOv2, or random."""
    weights: str | None = None
    """A trained tracker to start from: a released LoRAT file, or adapter.safetensors of a run."""
    pos_mode: PosMode = "resample"
    """How positions come to the search grid, see `tasks/tracking/model/embedding.py`."""
    method: str = METHOD
    """Method, preset or product of the registry, as in dora+glad; none for types and head alone."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method, as in --adapter.rank 16."""
    init_batches: int | None = None
    """Training batches that an initialiser looks at, if it looks at data (8)."""
    data: list[str] = field(default_factory=lambda: ["lasot", "got10k_vot", "trackingnet", "coco"])
    """Data sets below root, or NAME:PATH, as in folder:PATH and synthetic:PATH (photographs)."""
    root: str = "data"
    """Folder that holds the data sets, each in a folder of its name."""
    data_weights: list[float] | None = None
    """How often each data set is drawn; equally by default."""
    fixed_pairs: int | None = None
    """Train on so many pairs again and again, to see whether a model can learn them."""
    reach: float = REACH
    """Farthest that the search crop is moved, in mean sides of the object (3)."""
    spread: float = SCALE_STD
    """Deviation of the logarithm of the search crop's scale, each axis by itself (0.25)."""
    third_augment: float = 1.0
    """Share of pairs that are made grey, solarised or blurred."""
    epochs: int = 170
    """Length of training."""
    epoch_pairs: int = 131_072
    """Pairs per epoch."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    warmup_steps: int | None = None
    """Steps of rising learning rate; default two epochs, at most a tenth of all steps."""
    batch_size: int = 128
    """Pairs per step, over all processes."""
    accumulate: int = 1
    """Parts into which the batch of a step is divided, to save memory."""
    lr: float = 1e-4
    """Learning rate, not multiplied by the number of processes."""
    weight_decay: float = 0.1
    """Decay of matrices; token types, biases and single rows have none."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward; LoRAT trains in fp16. bf16 where fp16 gives steps not finite."""
    lean: bool = False
    """Keep no input that a norm or an activation makes again: less memory, the same gradients."""
    workers: int = 0
    """Processes that prepare batches; any number gives the same ones."""
    seed: int = 0
    """Seed of the initial values, the pairs, their augmentation and drop-path."""
    output: str | None = None
    """Run folder; default runs/tracking/train-<tracker>-<method>, numbered if that is taken."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, default 10 epochs; 0 for none."""
    keep_checkpoints: int = 5
    """How many checkpoints are kept."""
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""

    def __post_init__(self) -> None:
        """Check names and ranges before anything is loaded."""
        for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    flag = name.replace("_", "-")
                    raise ConfigError(f"--{flag} must be at least {least}, got {value}")
        for name in ("lr", "clip_norm", "reach"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}"
                )
        if not 0 <= self.spread < float("inf"):
            raise ConfigError(f"--spread must not be negative, got {self.spread}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"--weight-decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.third_augment <= 1:
            raise ConfigError(f"--third-augment must lie in [0, 1], got {self.third_augment}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"--batch-size {self.batch_size} cannot be divided into {self.accumulate} parts"
            )
        if not self.data:
            raise ConfigError("--data names no data set")
        for spec in self.data:
            split_spec(spec)
        if self.data_weights is not None and len(self.data_weights) != len(self.data):
            raise ConfigError(
                f"--data-weights: {len(self.data_weights)} numbers for {len(self.data)} data sets"
            )
        variant = find_variant(self.tracker)
        if self.recipe is None and self.adapter:
            raise ConfigError("--adapter options need a method; --method is none")
        if self.init_batches is not None and not self.looks_at_data:
            raise ConfigError(f"--init-batches: the start of {self.method} looks at no data")
        if self.recipe is not None:
            self.recipe.config(**self.adapter_options(variant.rank))

    @property
    def recipe(self) -> Recipe | None:
        """The method with its initialiser and dynamics, None for types and head alone."""
        return None if self.method == NONE else parse(self.method)

    @property
    def looks_at_data(self) -> bool:
        """Whether the initial values follow from training batches."""
        init = self.recipe.init if self.recipe else None
        return init is not None and bool(init.needs)

    def adapter_options(self, rank: int) -> dict[str, Any]:
        """Return the options of the method, with the tracker's rank unless one is said."""
        assert self.recipe is not None
        fields = get_method(self.recipe.method).config.__dataclass_fields__
        said = {**self.recipe.implied, **self.recipe.options, **self.adapter}
        usual = {"rank": rank} if "rank" in fields and "rank" not in said else {}
        return {**usual, **self.adapter}

    def resolved(self) -> "TrainConfig":
        """Return the settings with everything filled in that the user left open."""
        per_epoch = max(1, self.epoch_pairs // self.batch_size)
        steps = self.steps or self.epochs * per_epoch
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(WARMUP_EPOCHS * per_epoch, steps // WARMUP_SHARE)
        every = self.checkpoint_every
        return dataclasses.replace(
            self,
            steps=steps,
            warmup_steps=warmup,
            checkpoint_every=CHECKPOINT_EPOCHS * per_epoch if every is None else every,
            init_batches=(self.init_batches or INIT_BATCHES) if self.looks_at_data else None,
        )
