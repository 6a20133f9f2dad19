"""Which samples a step sees, as a pure function of the step.

A resumed run asks for step 500 and gets what the uninterrupted run got. Under several processes
every process computes the same indices and takes its own part of them:

    sampler = StepSampler(len(data), batch_size=32, seed=1)

    def batches(step: int) -> Batch:
        return collate([data[i] for i in shard(sampler.indices(step), *process())])
"""

import os
from collections.abc import Sequence

import numpy as np

from visionlora.errors import ConfigError, DataError


class StepSampler:
    """Cuts an endless stream of epoch permutations into batches of one size.

    Every sample comes once per epoch. A batch may span two epochs, so it is never short, and it may
    be larger than the data set.

    Args:
        size: number of samples.
        batch_size: number of indices per step, over all processes.
        seed: start of the private generators, one per epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0) -> None:
        if size < 1:
            raise DataError(f"cannot sample from {size} samples")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ConfigError(f"seed must not be negative, got {seed}")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self._recent: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """Return the sample indices of one step."""
        start = step * self.batch_size
        found: list[int] = []
        while len(found) < self.batch_size:
            epoch, offset = divmod(start + len(found), self.size)
            found += self._permutation(epoch)[offset : offset + self.batch_size - len(found)]
        return found

    def _permutation(self, epoch: int) -> list[int]:
        # Two epochs are kept because a batch may span them; the values do not depend on it.
        if epoch not in self._recent:
            while len(self._recent) > 1:
                self._recent.pop(next(iter(self._recent)))
            generator = np.random.default_rng((self.seed, epoch))
            self._recent[epoch] = generator.permutation(self.size).tolist()
        return self._recent[epoch]


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) outside a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shard(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """Return the part of a batch that belongs to process `rank` of `world`.

    All parts have the same size, so that the mean over processes is the mean over the batch.
    """
    if len(indices) % world:
        raise ConfigError(
            f"a batch of {len(indices)} cannot be shared equally by {world} processes"
        )
    return list(indices[rank::world])
