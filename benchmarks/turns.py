"""Turns, ratios and the clock that all tables of times share."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(group: Sequence[Callable[[], T]], repeats: int, deadline: float) -> list[list[T]]:
    """Call all members once per round, and return what each returned, round by round.

    No round is begun after the deadline, except the first.
    """
    found: list[list[T]] = [[] for _ in group]
    for round_ in range(repeats):
        if round_ and time.monotonic() > deadline:
            break
        for place in range(len(group)):
            index = (place + round_) % len(group)  # no one always runs first
            found[index].append(group[index]())
    return found


def clock_for(threads: int) -> Callable[[], float]:
    """Return the clock to time with.

    The CPU time of several threads adds up, their waiting included; one thread's does not.
    """
    return time.process_time if threads == 1 else time.perf_counter


def median_ratio(values: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return statistics.median(value / base for value, base in zip(values, floor, strict=True))
