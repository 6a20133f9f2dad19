r"""ICM-LoRA: LoRA adapters generated from task vectors (Shao et al. 2025, arXiv 2501.17635).

    x = standardise(flatten(canonical(adapter)))      one vector per snapshot
    train:     CVAE on (x, c), c the task vector      AdamW 2e-4, cosine, batch 2, 2000 epochs
    generate:  z ~ N(0, I), x' = decode(z, c), adapter = unflatten(restore(x'))

The defaults are the published ones, for adapters of millions of entries; a small adapter wants few
channels. Derived here: pairs are made canonical before they are flattened (see `canonical`); the
statistics of the tensors are averaged over the training tasks and stored in the generator, so that
a task which was never trained can be asked for; task vectors are centred and divided by one number,
their root mean square distance from the centre, because those of CLIP lie close together.

A generator is one safetensors file: network, statistics, and as JSON the description of the
adapters it makes. Adapters of other sites, shapes or base weights are refused.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import check_fields
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.generate.canonical import canonical_tensors
from visionlora.generate.cvae import CVAE, negative_elbo
from visionlora.generate.flatten import Layout, Statistics
from visionlora.generate.snapshots import TaskSnapshots, read_snapshots
from visionlora.io import checks
from visionlora.io.adapter_file import AdapterFile, parse_adapter, write_description
from visionlora.io.atomic import write_atomically
from visionlora.io.native import load
from visionlora.training import RunDirectory, StepSampler, TrainSettings, cosine, fit

FORMAT = "visionlora-generator"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Size and training of a generator; the defaults are the published ones."""

    channels: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
    """Channels of the encoder; every entry halves the length, and the decoder mirrors them."""
    latent: int = 256
    """Entries of z."""
    kl_weight: float = 0.005
    """Weight of the KL divergence."""
    lr: float = 2e-4
    """Learning rate of AdamW; falls to 0 along a cosine."""
    batch_size: int = 2
    """Snapshots per step."""
    epochs: int = 2000
    """Passes over all snapshots."""
    seed: int = 0
    """Seed of initial values, order and noise."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.channels or min(self.channels) < 2:
            raise ConfigError(f"channels must be numbers from 2 on, got {self.channels}")
        for name in ("latent", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.kl_weight >= 0:
            raise ConfigError(
                f"lr must be positive and kl_weight not negative, got {self.lr}, {self.kl_weight}"
            )


@dataclass(frozen=True)
class Generator:
    """A trained generator."""

    network: CVAE
    config: GeneratorConfig
    layout: Layout
    statistics: Statistics
    centre: Float[Tensor, " condition"]
    """Mean of the training tasks' vectors."""
    spread: Float[Tensor, ""]
    """Root mean square distance of their entries from the centre."""
    adapter: AdapterFile
    """Description of the adapters it makes; no tensors."""
    tasks: tuple[str, ...]
    """Names of the tasks that it was trained on."""

    @torch.no_grad()
    def generate(self, vector: Float[Tensor, " condition"], *, seed: int = 0) -> dict[str, Tensor]:
        """Return the tensors of an adapter for the task that `vector` describes.

        Args:
            vector: made like those of the training tasks.
            seed: of the latent; another seed gives another adapter for the same task.

        Raises:
            ConfigError: a vector of another size, or one that is not finite.
        """
        z = torch.randn(1, self.config.latent, generator=torch.Generator().manual_seed(seed))
        return self._tensors(self.network.decode(z, self._condition(vector)))

    @torch.no_grad()
    def reconstruct(
        self, tensors: dict[str, Tensor], vector: Float[Tensor, " condition"]
    ) -> dict[str, Tensor]:
        """Return what encoder and decoder make of an adapter, for measuring the error.

        The adapter is turned towards the one at z = 0, as snapshots are towards their last.
        """
        if difference := self.layout.difference(Layout.of(tensors)):
            raise AdapterFileError(f"the adapter is not of this generator's kind: {difference}")
        sites = [site for site, _ in self.adapter.plan]
        condition = self._condition(vector)
        reference = self._tensors(
            self.network.decode(torch.zeros(1, self.config.latent), condition)
        )
        flat = self.layout.flatten(canonical_tensors(tensors, sites, reference))
        x = self.statistics.standardise(self.layout, flat)[None]
        found, _, _ = self.network(x, condition)
        return self._tensors(found)

    def write(
        self, path: str | Path, vector: Float[Tensor, " condition"], *, seed: int = 0
    ) -> Path:
        """Generate an adapter and write it as a native adapter file, which `vl.load` reads."""
        description = write_description(self.adapter.plan, self.adapter.frozen, self.adapter.base)
        return _write_tensors(path, self.generate(vector, seed=seed), description)

    def check(self, model: nn.Module) -> None:
        """Raise `AdapterFileError` unless `model` has the sites and weights of the snapshots."""
        checks.check_sites(model, self.adapter)
        checks.check_base(model, self.adapter)

    def apply(
        self,
        model: nn.Module,
        vector: Float[Tensor, " condition"],
        *,
        seed: int = 0,
        name: str = "default",
    ) -> nn.Module:
        """Generate an adapter and put it into `model`, in place.

        Raises:
            AdapterFileError: a model of another architecture; it is untouched then.
        """
        self.check(model)
        with tempfile.TemporaryDirectory() as folder:
            return load(model, self.write(Path(folder) / "generated", vector, seed=seed), name=name)

    def save(self, path: str | Path) -> Path:
        """Write the generator to one safetensors file, completely or not at all."""
        tensors = {f"network.{name}": item for name, item in self.network.state_dict().items()}
        tensors |= {
            "statistics.mean": self.statistics.mean,
            "statistics.std": self.statistics.std,
            "condition.centre": self.centre,
            "condition.spread": self.spread,
        }
        adapter = write_description(self.adapter.plan, self.adapter.frozen, self.adapter.base)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "config": dataclasses.asdict(self.config),
            "shapes": self.layout.shapes,
            "tasks": self.tasks,
            "adapter": adapter,
        }
        return _write_tensors(path, tensors, json.dumps(header))

    @classmethod
    def load(cls, path: str | Path) -> "Generator":
        """Read what `save` wrote.

        Raises:
            AdapterFileError: the file is missing, truncated, inconsistent or no generator.
        """
        path = Path(path)
        if not path.is_file():
            raise AdapterFileError(f"no generator file at {path}")
        try:
            with safetensors.safe_open(path, "pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            header = json.loads(metadata["visionlora"])
            if header["format"] != FORMAT or header["version"] > VERSION:
                raise AdapterFileError(
                    f"{path} has format {header['format']} version {header['version']}; this "
                    f"version of visionlora reads {FORMAT} up to version {VERSION}"
                )
            return cls._parse(path, header, tensors)
        except (safetensors.SafetensorError, OSError) as error:
            raise AdapterFileError(
                f"{path} is truncated or not a safetensors file ({error})"
            ) from error
        except AdapterFileError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise AdapterFileError(f"{path} is a damaged generator ({reason})") from error

    @classmethod
    def _parse(cls, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> "Generator":
        config = GeneratorConfig(
            **{**header["config"], "channels": tuple(header["config"]["channels"])}
        )
        layout = Layout({name: tuple(shape) for name, shape in header["shapes"].items()})
        statistics = Statistics(tensors.pop("statistics.mean"), tensors.pop("statistics.std"))
        centre, spread = tensors.pop("condition.centre"), tensors.pop("condition.spread")
        network = _network(layout.length, len(centre), config)
        network.load_state_dict(
            {name.removeprefix("network."): item for name, item in tensors.items()}
        )
        adapter = parse_adapter(path, header["adapter"], {})
        return cls(
            network.eval(), config, layout, statistics, centre, spread, adapter,
            tuple(header["tasks"]),
        )  # fmt: skip

    def _condition(self, vector: Tensor) -> Tensor:
        if not isinstance(vector, Tensor) or vector.shape != self.centre.shape:
            given = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ConfigError(
                f"the task vector must be a tensor of {len(self.centre)} entries, got {given}"
            )
        if not bool(torch.isfinite(vector).all()):
            raise ConfigError("the task vector holds NaN or infinity")
        return ((vector.detach().float().cpu() - self.centre) / self.spread)[None]

    def _tensors(self, x: Float[Tensor, "one length"]) -> dict[str, Tensor]:
        return self.layout.unflatten(self.statistics.restore(self.layout, x[0]))


def train_generator(
    tasks: Sequence[TaskSnapshots],
    config: GeneratorConfig,
    run: RunDirectory,
    *,
    device: str = "auto",
) -> Generator:
    """Train a generator on the snapshots of several tasks.

    Args:
        tasks: at least two, of one architecture and base model.
        config: size and training.
        run: where the log goes; a run opened with `resume` continues from its checkpoint.
        device: where the network is trained; the generator returned is on the CPU.

    Raises:
        AdapterFileError: a snapshot that is unreadable or of another architecture than the first.
        ConfigError: too few tasks, or task vectors that do not tell the tasks apart.
    """
    vectors = _stack_vectors(tasks)
    snapshots = read_snapshots(tasks)
    layout = snapshots.layout
    statistics = Statistics.over(layout, snapshots.vectors)
    centre = vectors.mean(0)
    spread = (vectors - centre).square().mean().sqrt()
    conditions = (vectors - centre) / spread
    data = torch.cat([statistics.standardise(layout, item) for item in snapshots.vectors])
    labels = torch.cat(
        [torch.full((len(item),), index) for index, item in enumerate(snapshots.vectors)]
    )
    network = _network(layout.length, vectors.shape[1], config)
    sampler = StepSampler(len(data), config.batch_size, config.seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        chosen = sampler.indices(step)
        return data[chosen], conditions[labels[chosen]]

    steps = math.ceil(config.epochs * len(data) / config.batch_size)
    fit(
        network.train(),
        torch.optim.AdamW(network.parameters(), lr=config.lr),
        partial(negative_elbo, kl_weight=config.kl_weight),
        batches,
        TrainSettings(steps=steps, seed=config.seed, device=device),
        run,
        schedule=cosine(steps),
    )
    return Generator(
        network.cpu().eval(),
        config,
        layout,
        statistics,
        centre,
        spread,
        dataclasses.replace(snapshots.adapter, path=Path("the generator"), tensors={}),
        tuple(task.name for task in tasks),
    )


def _stack_vectors(tasks: Sequence[TaskSnapshots]) -> Float[Tensor, "tasks condition"]:
    """Check that the task vectors can tell the tasks apart, and stack them."""
    if len(tasks) < 2:
        raise ConfigError(f"a generator is trained on at least two tasks, got {len(tasks)}")
    for index, task in enumerate(tasks):
        if task.vector.ndim != 1 or task.vector.shape != tasks[0].vector.shape:
            raise ConfigError(
                f"task {task.name!r} has a task vector of shape {tuple(task.vector.shape)}, "
                f"{tasks[0].name!r} one of {tuple(tasks[0].vector.shape)}"
            )
        if not bool(torch.isfinite(task.vector).all()):
            raise ConfigError(f"the task vector of {task.name!r} holds NaN or infinity")
        for other in tasks[:index]:
            if task.name == other.name or torch.equal(task.vector, other.vector):
                raise ConfigError(
                    f"tasks {other.name!r} and {task.name!r} share a name or a task vector"
                )
    return torch.stack([task.vector.detach().float().cpu() for task in tasks])


def _network(length: int, condition: int, config: GeneratorConfig) -> CVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CVAE(length, condition, config.channels, config.latent)


def _write_tensors(path: str | Path, tensors: dict[str, Tensor], description: str) -> Path:
    data = safetensors.torch.save(
        {key: item.detach().contiguous().cpu() for key, item in tensors.items()},
        {"visionlora": description},
    )

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    return write_atomically(path, write)
