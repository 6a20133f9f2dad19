"""Settings of pre-training, of one adaptation, and of a comparison of several.

Defaults fit `nafnet-tiny` on a CPU. Sizes after the official NAFNet and Restormer recipes are in
configs/restoration. The exact values of the paper (Park et al. 2024, arXiv 2408.01099) are not
known, so everything that is derived is an option.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.restoration.degradations.prod import Mode
from tasks.restoration.networks.catalogue import find_network
from tasks.restoration.pairs.layouts import AUTO
from tasks.restoration.pairs.sources import split_spec
from tasks.restoration.training.losses import LossName
from tasks.restoration.training.methods import check_method, rate_of
from visionlora.errors import ConfigError, nearest

Score = Literal["faig", "grad", "magnitude"]
CHECKPOINTS = 10
"""How many checkpoints a run writes."""
PROBE_SHARE = 10
"""The probe trains for this fraction of the steps."""
VALIDATIONS = 5
"""How often an adaptation looks at the validation pairs."""
LEAST: dict[str, int] = {
    **dict.fromkeys(("steps", "patch", "batch_size", "accumulate", "keep_checkpoints"), 1),
    **dict.fromkeys(("train_images", "val_every", "probe_steps", "probe_patches", "points"), 1),
    **dict.fromkeys(
        ("workers", "seed", "split_seed", "val_images", "test_images", "checkpoint_every"), 0
    ),
    "least": 0,
}
SHARES = ("identity", "budget", "beta")
POSITIVE = ("lr", "clip_norm", "gamma", "budget")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What pre-training and adaptation have in common."""

    patch: int = 48
    """Side of the training patches."""
    batch_size: int = 8
    """Patches per step, over all processes."""
    accumulate: int = 1
    """Parts into which the batch of a step is divided, to save memory."""
    loss: LossName = "l1"
    """l1, or psnr: ten times the logarithm of the squared error, negative by design."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.9])
    """Of AdamW; NAFNet has 0.9 0.9, Restormer 0.9 0.999."""
    weight_decay: float = 0.0
    """Decay of what is trained."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int = 0
    """Processes that prepare batches; any number gives the same ones."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, default a tenth of all; 0 for none."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""
    output: str | None = None
    """Run folder; by default a name below runs/restoration, numbered if that is taken."""
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""

    def __post_init__(self) -> None:
        """Check ranges before anything is loaded."""
        for name, least in LEAST.items():
            value = getattr(self, name, None)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{_flag(name)} must be at least {least}, got {value}")
        for name in SHARES:
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ConfigError(f"{_flag(name)} must lie in [0, 1], got {getattr(self, name)}")
        for name in POSITIVE:
            value = getattr(self, name, None)
            if isinstance(value, float | int) and not 0 < value < float("inf"):
                raise ConfigError(f"{_flag(name)} must be positive, got {value}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"--weight-decay must not be negative, got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"--betas are two numbers in [0, 1), got {self.betas}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"--batch-size {self.batch_size} cannot be divided into {self.accumulate} parts"
            )

    def interval(self, steps: int) -> int:
        """Return the steps between checkpoints."""
        every = self.checkpoint_every
        return -(-steps // CHECKPOINTS) if every is None else every


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Pre-train a network on clean pictures that are degraded on the way."""

    clean: list[str]
    """Folders of clean pictures."""
    net: str = "nafnet-tiny"
    """nafnet-tiny, nafnet-small, nafnet-32, nafnet-64, nafnet-gopro-*, restormer, ..."""
    mode: Mode = "prod"
    """prod (a random selection in random order), single, fixed, or fixed-subset."""
    most: int = 5
    """Largest number of degradations of one patch, in modes prod and fixed-subset."""
    identity: float = 0.0
    """Share of patches that stay clean, so that mild pictures are not harmed before adaptation."""
    steps: int = 1600
    """Length of training."""
    lr: float = 1.5e-3
    """Largest learning rate; it falls to 1e-7 along a cosine."""
    seed: int = 0
    """Seed of initial values, patches and degradations."""

    def __post_init__(self) -> None:
        """Check names too."""
        super().__post_init__()
        find_network(self.net)
        if not self.clean:
            raise ConfigError("--clean names no folder")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RunConfig):
    """Which pairs are for what, and how ranks are decided."""

    base: str = "tiny"
    """tiny, a base file, or NETWORK:random."""
    data: str
    """Folder of pairs, or TASK:FOLDER of clean pictures, as in derain:photos."""
    task: str
    """What the adapter is for, as in denoise."""
    layout: str = AUTO
    """How pairs lie on disk, see `check`; found out by default."""
    val: str | None = None
    """Other pairs to validate on, instead of some of the data."""
    val_images: int = 2
    """Pictures to validate on; the best weights on them are kept. 0 keeps the last."""
    test_images: int = 0
    """Pictures that are left out and measured at the end."""
    split_seed: int = 0
    """Which pictures are for what; the same for all methods, seeds and numbers of pictures."""
    val_patch: int | None = 256
    """Validation and test are on the middle of this side; null for whole pictures."""
    steps: int = 250
    """Length of training."""
    val_every: int | None = None
    """Steps between validations, default a fifth of all."""
    extras: bool = True
    """Whether biases, norms and scale vectors are trained too."""
    budget: float = 0.07
    """Largest share of all parameters that colora and lora train."""
    gamma: float = 0.5
    """Exponent of the contribution in colora's ranks."""
    beta: float = 0.01
    """Share of freedom that every layer has in colora."""
    least: int = 1
    """Least rank of a layer in colora; 0 lets layers stay frozen."""
    scores: str | None = None
    """File of contributions, as `contribution` writes it; otherwise a probe finds them."""
    score: Score = "faig"
    """What a contribution is: faig, grad (no probe) or magnitude."""
    probe_steps: int | None = None
    """Steps of the probe, a short full tuning that is thrown away; default a tenth of all."""
    probe_patches: int = 8
    """Patches on which contributions are taken, one by one."""
    points: int = 16
    """Points of the path from the base to the probe."""

    def __post_init__(self) -> None:
        """Check names too."""
        super().__post_init__()
        kind, _ = split_spec(self.data)
        if kind == "prod":
            raise ConfigError("--data prod:FOLDER is for pretrain; adapt needs a task")
        if not self.task.strip():
            raise ConfigError("--task must not be empty")
        if self.val is not None:
            split_spec(self.val)
        if self.val_patch is not None and self.val_patch < 1:
            raise ConfigError(f"--val-patch must be at least 1 or null, got {self.val_patch}")
        if not self.budget:
            raise ConfigError("--budget must be positive, got 0")

    @property
    def probe_length(self) -> int:
        """Steps of the probe."""
        return self.probe_steps or max(1, self.steps // PROBE_SHARE)

    @property
    def val_interval(self) -> int:
        """Steps between validations."""
        return self.val_every or -(-self.steps // VALIDATIONS)


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(DataConfig):
    """Adapt a base network to a task."""

    method: str = "colora"
    """colora, lora, full, decoder, bias, scratch, or any of the registry, as in dora+glad."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method, as in --adapter.rank 4."""
    lr: float | None = None
    """Largest learning rate, falling to 1e-6; 1e-3, full and decoder 4e-4, scratch 1.5e-3."""
    seed: int = 0
    """Seed of initial values and patches."""
    train_images: int | None = None
    """Pictures to train on, the first ones of the shuffled list; default all that are left."""

    def __post_init__(self) -> None:
        """Check the method too."""
        super().__post_init__()
        check_method(self.method, self.adapter)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or rate_of(self.method)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DataConfig):
    """Adapt with several methods, seeds and numbers of pictures, and compare the figures."""

    methods: list[str] = field(default_factory=lambda: ["colora", "lora", "full", "bias"])
    """Methods, as in adapt."""
    train_images: list[int] = field(default_factory=lambda: [16])
    """Numbers of pictures to train on."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of initial values and patches."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of a method, as in --adapter.dora.rank 4."""
    lr: dict[str, Any] = field(default_factory=dict)
    """Learning rate of a method, as in --lr.full 2e-4."""
    test_images: int = 4
    """Pictures that are left out of all trainings, and on which all are measured."""

    def __post_init__(self) -> None:
        """Check that every run could begin."""
        super().__post_init__()
        for name, values in (
            ("methods", self.methods),
            ("train-images", self.train_images),
            ("seeds", self.seeds),
        ):
            if not values or len(set(map(str, values))) < len(values):
                raise ConfigError(f"--{name} needs different values, got {values}")
        if not self.test_images:
            raise ConfigError("--test-images must be at least 1: figures are of these pictures")
        for option, given in (("adapter", self.adapter), ("lr", self.lr)):
            for method in given:
                if method not in self.methods:
                    near = nearest(method, self.methods)
                    raise ConfigError(f"--{option}.{method}: not among --methods{near}")
        for method in self.methods:
            self.single(method, self.train_images[0], self.seeds[0], "")

    def single(self, method: str, count: int, seed: int, output: str) -> AdaptConfig:
        """Return the settings of one run; it goes on where it was stopped."""
        shared = {item.name: getattr(self, item.name) for item in dataclasses.fields(DataConfig)}
        own = self.adapter.get(method, {})
        if not isinstance(own, dict):
            raise ConfigError(f"--adapter.{method} needs an option, as in --adapter.{method}.rank")
        rate = self.lr.get(method)
        if rate is not None and not isinstance(rate, int | float):
            raise ConfigError(f"--lr.{method} must be a number, got {rate!r}")
        said = {"method": method, "adapter": own, "lr": rate, "train_images": count, "seed": seed}
        run = {"output": output, "resume": True, "overwrite": False}
        return AdaptConfig(**{**shared, **said, **run})


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
