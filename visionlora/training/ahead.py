"""Numbered samples, made by worker processes in advance.

    step -> numbers(step) -> [make(n) for n in numbers]

What is made depends on its number alone, so workers decide when it is made and never what: any
number of them gives the same bits, and a run that is resumed at step 500 gets those of step 500.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from visionlora.errors import ConfigError, VisionLoraError

Item = TypeVar("Item")
AHEAD = 4
"""Steps that each worker prepares in advance."""


class Ahead(Generic[Item]):
    """The samples of a step.

    Args:
        make: gives a sample by its number; an error of it comes out where the sample is asked for.
        numbers: which samples a step has.
        workers: processes that prepare steps; 0 makes samples where they are asked for.
    """

    def __init__(
        self,
        make: Callable[[int], Item],
        numbers: Callable[[int], list[int]],
        workers: int = 0,
    ) -> None:
        if workers < 0:
            raise ConfigError(f"workers must not be negative, got {workers}")
        self.make = make
        self.numbers = numbers
        self.workers = workers
        self._running: Iterator[list[Item | VisionLoraError]] | None = None
        self._next = 0

    def __call__(self, step: int) -> list[Item]:
        """Return the samples of a step; steps in order keep the workers at work."""
        if not self.workers:
            return [self.make(number) for number in self.numbers(step)]
        if self._running is None or step != self._next:
            self._running = iter(
                DataLoader(
                    _Made(self.make),
                    batch_sampler=_Steps(self.numbers, step),
                    num_workers=self.workers,
                    prefetch_factor=AHEAD,
                    collate_fn=list,
                    worker_init_fn=_alone,
                    # Without its own generator a loader draws from the one of the training.
                    generator=torch.Generator(),
                )
            )
        self._next = step + 1
        made: list[Item] = []
        for item in next(self._running):
            if isinstance(item, VisionLoraError):
                raise item
            made.append(item)
        return made

    def close(self) -> None:
        """Stop the workers."""
        self._running = None


class _Made(Dataset[Item | VisionLoraError]):
    """Samples by number, and errors as items: raised in a worker, they would lose their message."""

    def __init__(self, make: Callable[[int], Item]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Item | VisionLoraError:
        try:
            return self.make(number)
        except VisionLoraError as error:
            return error


class _Steps(Sampler[list[int]]):
    """The numbers of step after step, without end."""

    def __init__(self, numbers: Callable[[int], list[int]], start: int) -> None:
        self.numbers = numbers
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            yield self.numbers(step)
            step += 1


def _alone(_: int) -> None:
    """Keep a worker to one thread; the other cores have workers of their own."""
    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # OpenCV counts its threads by itself
        sys.modules["cv2"].setNumThreads(0)
