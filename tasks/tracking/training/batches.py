"""Batches by their step, made by worker processes in advance (`visionlora/training/ahead.py`)."""

from collections import Counter

import torch

from tasks.tracking.training.samples import Batch, Sample, Samples
from visionlora.training.ahead import Ahead
from visionlora.training.sampler import StepSampler, process, shard

KEPT = 1024


class Batches:
    """Batch number `step`; under several processes the part of this one.

    Args:
        samples: the samples.
        batch_size: samples per step over all processes.
        workers: processes that prepare batches; 0 makes them where they are asked for.
        fixed: use this many samples again and again, in shuffled epochs, instead of new ones; a
            thousand of them are kept in memory.
    """

    def __init__(
        self, samples: Samples, batch_size: int, *, workers: int = 0, fixed: int | None = None
    ) -> None:
        self.samples = samples
        make = _Kept(samples, 0 if fixed is None else KEPT)
        self.batch_size = batch_size
        self.unusable: Counter[str] = Counter()
        """Reasons why draws of this process were given up, and how often."""
        self._order = None if fixed is None else StepSampler(fixed, batch_size, samples.seed)
        self._ahead = Ahead(make, self.numbers, workers)

    def numbers(self, step: int) -> list[int]:
        """Return which samples this process gets in a step."""
        start = step * self.batch_size
        wanted = range(start, start + self.batch_size)
        return shard(self._order.indices(step) if self._order else wanted, *process())

    def __call__(self, step: int) -> Batch:
        """Return a batch.

        Raises:
            DataError: see `Samples`.
        """
        made = self._ahead(step)
        for sample in made:
            self.unusable.update(sample.unusable)
        return collate(made)

    def close(self) -> None:
        """Stop the workers."""
        self._ahead.close()


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    return Batch(*map(torch.stack, zip(*(sample.row for sample in samples), strict=True)))


class _Kept:
    """Samples by number, the first `kept` of which are made only once."""

    def __init__(self, samples: Samples, kept: int) -> None:
        self.samples = samples
        self.kept = kept
        self._made: dict[int, Sample] = {}

    def __call__(self, number: int) -> Sample:
        if number in self._made:
            return self._made[number]
        made = self.samples(number)
        if number < self.kept:
            self._made[number] = made
        return made
