"""What an evaluation has finished: `results/<sequence>.txt` and `results/<sequence>_time.txt`.

Boxes are written as the benchmark's own files count them, the seconds of the tracker beside them.
The file of boxes comes last and is written in one piece, so a sequence is either there or not. A
run that goes on, and every figure, reads these files: what is scored is what is on disk.
"""

from pathlib import Path

from tasks.tracking.evaluation.result_files import (
    FormatName,
    write_boxes,
    write_times,
)
from tasks.tracking.evaluation.result_folder import Result, read_result
from tasks.tracking.runner import Run
from tasks.tracking.sequences.sequence import Sequence
from visionlora.errors import DataError

__all__ = ["SERVERS", "Results"]

SERVERS: dict[str, FormatName] = {"got10k": "got10k", "trackingnet": "trackingnet"}
"""Benchmarks whose truth is not public, and what their servers want."""
FORMATS: dict[str, FormatName] = {**SERVERS, "got10k_val": "got10k"}
"""Of result files; the other benchmarks have LaSOT's."""


class Results:
    """The folder of one tracker's results on one benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, run: Run) -> None:
        """Write what a tracker said about a sequence."""
        sequence = run.sequence
        write_times(self._times(sequence), run.seconds)
        style = FORMATS.get(sequence.benchmark, "lasot")
        write_boxes(self._boxes(sequence), sequence.in_file(run.boxes), style)

    def load(self, sequence: Sequence) -> Result | None:
        """Return what was written, in the files' own convention; None if it is not finished.

        Raises:
            DataError: a file that was damaged, or is of another sequence with this name.
        """
        file = self._boxes(sequence)
        if not file.is_file():
            return None
        result = read_result([file])
        counts = (len(result.repeats[0]), 0 if result.seconds is None else len(result.seconds))
        if counts != (len(sequence), len(sequence)):
            raise DataError(
                f"{file} has {counts[0]} boxes, with {counts[1]} times beside it, for the "
                f"{len(sequence)} frames of {sequence.name!r}; remove it, and the sequence is "
                "tracked again"
            )
        return result

    def clear(self) -> None:
        """Remove all results."""
        if self.folder.is_dir():
            for file in self.folder.glob("*.txt"):
                file.unlink()

    def _boxes(self, sequence: Sequence) -> Path:
        return self.folder / f"{sequence.name}.txt"

    def _times(self, sequence: Sequence) -> Path:
        return self.folder / f"{sequence.name}_time.txt"
