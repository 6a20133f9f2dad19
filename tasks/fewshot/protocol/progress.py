"""How far a protocol is, and about how long the rest takes."""

import time

from tasks.fewshot.report import print_note


class Progress:
    """Counts runs; what is left is estimated from seconds per step, of the same method if known.

    Args:
        planned: steps of every run that is still to be done, by its name and method.
        found: how many runs are there already.
        enabled: False for the processes that should be silent.
    """

    def __init__(
        self, planned: dict[tuple[str, str], int], found: int, *, enabled: bool = True
    ) -> None:
        self.planned = dict(planned)
        self.total = len(planned) + found
        self.found = found
        self.enabled = enabled
        self.spent: dict[str, list[float]] = {}
        self._began = time.monotonic()
        if found and enabled:
            print_note(f"{found} of {self.total} runs are done already")

    def done(self, key: tuple[str, str], figures: str) -> None:
        """Say that a run is done, what came out, and when the rest will be."""
        now = time.monotonic()
        steps = self.planned.pop(key, None)
        if steps is None:
            return  # it was there before
        self.spent.setdefault(key[1], []).append((now - self._began) / steps)
        self._began = now
        number = self.total - len(self.planned)
        rest = f"; about {duration(self.left())} left" if self.planned else ""
        if self.enabled:
            print_note(f"[{number}/{self.total}] {key[0]}: {figures}{rest}")

    def drop(self, key: tuple[str, str]) -> None:
        """Take a run off the plan that cannot be done."""
        self.planned.pop(key, None)
        self._began = time.monotonic()

    def left(self) -> float:
        """Return the estimated seconds of all runs that are planned."""
        means = {method: sum(spent) / len(spent) for method, spent in self.spent.items()}
        usual = sum(means.values()) / max(1, len(means))
        return sum(steps * means.get(method, usual) for (_, method), steps in self.planned.items())


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
