"""One training sample as a pure function of its number: drawn, cut, degraded, turned.

Sample n uses a generator seeded by (seed, n) and nothing else, so a run that is killed and resumed,
or shared by several processes, sees the same patches. Both patches are mirrored and turned by
quarters together, all eight ways equally often, by albumentations.
"""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tasks.restoration.pairs.sources import Patch, Source
from visionlora.errors import ConfigError
from visionlora.training.ahead import Ahead
from visionlora.training.sampler import process, shard


class Batch(NamedTuple):
    """Patches, the clean ones in [0, 1]; noise that is added to clean pictures may leave it."""

    input: Float[Tensor, "b 3 p p"]
    target: Float[Tensor, "b 3 p p"]


class Samples:
    """The samples of a training run.

    Args:
        source: where patches come from.
        side: side of a patch.
        seed: of all draws.
        augment: whether patches are mirrored and turned.
    """

    def __init__(self, source: Source, side: int, seed: int, *, augment: bool = True) -> None:
        if side < 1:
            raise ConfigError(f"the side of a patch must be at least 1, got {side}")
        self.source = source
        self.side = side
        self.seed = seed
        self._turned = _eight_ways() if augment else None

    def __call__(self, number: int) -> tuple[Patch, Patch]:
        """Return sample `number`."""
        rng = np.random.default_rng((self.seed, number))
        degraded, clean = self.source.patch(self.side, rng)
        if self._turned is not None:
            self._turned.set_random_seed(int(rng.integers(2**31)))
            both = self._turned(image=degraded, target=clean)
            degraded, clean = both["image"], both["target"]
        return degraded, clean


class Batches:
    """Batch number `step`; under several processes the part of this one.

    Args:
        samples: the samples.
        batch_size: samples per step over all processes.
        workers: processes that prepare batches; 0 makes them where they are asked for.
    """

    def __init__(self, samples: Samples, batch_size: int, *, workers: int = 0) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.samples = samples
        self.batch_size = batch_size
        self._ahead = Ahead(samples, self.numbers, workers)

    def numbers(self, step: int) -> list[int]:
        """Return which samples this process gets in a step."""
        start = step * self.batch_size
        return shard(range(start, start + self.batch_size), *process())

    def __call__(self, step: int) -> Batch:
        """Return a batch."""
        inputs, targets = zip(*self._ahead(step), strict=True)
        return Batch(_stacked(inputs), _stacked(targets))

    def close(self) -> None:
        """Stop the workers."""
        self._ahead.close()


def _stacked(patches: tuple[Patch, ...]) -> Float[Tensor, "b 3 p p"]:
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()


def _eight_ways() -> Any:
    """Return the joint turns and mirrorings of a square."""
    # Importing it would ask a package index for news otherwise.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations as A
    except ModuleNotFoundError as error:
        raise ConfigError(
            "training turns patches with albumentations: pip install 'visionlora[restoration]'"
        ) from error
    return A.Compose([A.D4(p=1)], additional_targets={"target": "image"})
