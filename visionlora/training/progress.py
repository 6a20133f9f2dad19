"""The progress display of a run: a bar on a terminal, a rare plain line elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]


class Progress:
    """Shows step, figures, speed and remaining time on stderr.

    Args:
        total: number of steps of the whole run; None where nobody knows.
        description: short name of the run.
        start: steps done before, in a resumed run.
        enabled: False for the processes that should be silent.
        plain_every: seconds between plain lines when stderr is not a terminal.
    """

    def __init__(
        self,
        total: int | None,
        description: str = "train",
        *,
        start: int = 0,
        enabled: bool = True,
        plain_every: float = 30.0,
    ) -> None:
        self.total = total
        self.description = description
        self.start = start
        self.plain_every = plain_every
        self._bar: Bar | None = None
        self._plain = enabled and not sys.stderr.isatty()
        if enabled and not self._plain:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> "Progress":
        self._began = self._spoke = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.start, figures=""
            )
        return self

    def update(self, step: int, loss: float, lr: float) -> None:
        """Show that `step` steps are done, with the latest loss and learning rate."""
        self.show(step, f"loss {loss:.4g} lr {lr:.3g}")

    def show(self, step: int, figures: str) -> None:
        """Show that `step` steps are done, with some figures, speed and remaining time."""
        now = time.monotonic()
        if self._bar is None and not (self._plain and now - self._spoke >= self.plain_every):
            return
        rate = (step - self.start) / max(now - self._began, 1e-9)
        figures = f"{figures} {rate:.3g} it/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        else:
            self._spoke = now
            line = f"{self.description}: {step} {figures}"
            if self.total is not None:
                left = (self.total - step) / max(rate, 1e-9)
                line = f"{self.description}: {step}/{self.total} {figures}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
