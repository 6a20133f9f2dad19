"""Predictions on disk: a CSV file that grows batch by batch and is complete once it has its name.

While a run is under way its lines are in `predictions.csv.partial`, flushed after every batch. A
run that is killed or interrupted leaves that file, which holds every finished batch; a finished
one renames it to `predictions.csv`; one that is refused removes it.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from visionlora.errors import OutputError, VisionLoraError

COLUMNS = ("image", "class", "probability", "second_class", "second_probability", "error")
PARTIAL = ".partial"


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, best first, or why it cannot be read."""

    file: Path
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""

    def row(self, folder: Path) -> list[str]:
        """Return the cells of one line; an unreadable picture has only its name and the reason."""
        name = self.file.relative_to(folder).as_posix()
        if self.error:
            return [name, "", "", "", "", self.error]
        first, second = self.probabilities[:2]
        return [name, self.names[0], f"{first:.4f}", self.names[1], f"{second:.4f}", ""]


class PredictionFile:
    """Context that writes predictions of pictures below `folder` to `path`.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.folder = folder

    def __enter__(self) -> "PredictionFile":
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.partial.open("w", encoding="utf-8", newline="")
            self._csv = csv.writer(self._stream, lineterminator="\n")
            self._csv.writerow(COLUMNS)
        return self

    def write(self, batch: Sequence[Prediction]) -> None:
        """Append one line per picture; they outlive this process from here on."""
        with self._writing():
            self._csv.writerows(item.row(self.folder) for item in batch)
            self._stream.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._writing():
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._stream.close()
            if kind is None:
                self.partial.replace(self.path)
            elif issubclass(kind, VisionLoraError):
                self.partial.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
