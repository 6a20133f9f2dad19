"""Batches by their step, made by worker processes in advance.

Workers only decide when a sample is made, never which or how (`samples.py`), so any number of them
gives the same bits, and a run that is killed and resumed at step 500 gets the batch of step 500.
"""

from collections import Counter
from collections.abc import Iterator

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tasks.tracking.training.samples import Batch, Sample, Samples
from visionlora.training.sampler import StepSampler, process, shard

AHEAD = 4
"""Batches that each worker prepares in advance."""
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
        self.make = _Numbered(samples, 0 if fixed is None else KEPT)
        self.batch_size = batch_size
        self.workers = workers
        self.unusable: Counter[str] = Counter()
        """Reasons why draws of this process were given up, and how often."""
        self._order = None if fixed is None else StepSampler(fixed, batch_size, samples.seed)
        self._running: Iterator[list[Sample]] | None = None
        self._next = 0

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
        made = (
            self._from_workers(step)
            if self.workers
            else [self.make[number] for number in self.numbers(step)]
        )
        for sample in made:
            self.unusable.update(sample.unusable)
        return collate(made)

    def _from_workers(self, step: int) -> list[Sample]:
        if self._running is None or step != self._next:
            self._running = iter(
                DataLoader(
                    self.make,
                    batch_sampler=_Steps(self, step),
                    num_workers=self.workers,
                    prefetch_factor=AHEAD,
                    collate_fn=list,
                    worker_init_fn=_alone,
                    # Without its own generator a loader draws from the one that drop-path uses.
                    generator=torch.Generator(),
                )
            )
        self._next = step + 1
        return next(self._running)

    def close(self) -> None:
        """Stop the workers."""
        self._running = None


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    return Batch(*map(torch.stack, zip(*(sample.row for sample in samples), strict=True)))


class _Numbered(Dataset[Sample]):
    """Samples by number, the first `kept` of which are made only once."""

    def __init__(self, samples: Samples, kept: int) -> None:
        self.samples = samples
        self.kept = kept
        self._made: dict[int, Sample] = {}

    def __getitem__(self, number: int) -> Sample:
        if number in self._made:
            return self._made[number]
        made = self.samples(number)
        if number < self.kept:
            self._made[number] = made
        return made


class _Steps(Sampler[list[int]]):
    """The numbers of step after step, without end."""

    def __init__(self, batches: Batches, start: int) -> None:
        self.batches = batches
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            yield self.batches.numbers(step)
            step += 1


def _alone(_: int) -> None:
    """Keep a worker to one thread; the other cores have workers of their own."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
