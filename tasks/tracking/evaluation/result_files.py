"""Result files: a line `x y w h` per frame, as each benchmark's tools write and read it.

| format | boxes | seconds, `<sequence>_time.txt` |
|---|---|---|
| pytracking | tab, three decimals | one column |
| lasot | tab, three decimals | one column |
| got10k | comma, four decimals | a column per repetition, comma |
| trackingnet | comma, two decimals | - |

`sequences.text.read_boxes` reads any of them, with tabs, commas or spaces. Boxes are in the
convention of the benchmark's own annotations (LaSOT: the first pixel is 1, 1); `Sequence.in_file`
brings a tracker's there. Nothing is rounded beyond the decimals unless asked; old tools truncate
to whole pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from tasks.tracking.sequences.text import read_rows
from visionlora.io.atomic import write_text_atomically

FormatName = Literal["pytracking", "lasot", "got10k", "trackingnet"]
Rounding = Literal["none", "int", "outward"]
"""int: truncated, as the original tools do. outward: to whole pixels around the box."""

Boxes = Float[np.ndarray, "frames 4"]
TIME_DECIMALS = 8
OUTWARD_SLACK = 1e-4
"""A far edge at most this much beyond a pixel does not take the next one, as LoRAT has it."""


@dataclass(frozen=True)
class Format:
    """How one benchmark writes boxes."""

    separator: str
    decimals: int


FORMATS: dict[FormatName, Format] = {
    "pytracking": Format("\t", 3),
    "lasot": Format("\t", 3),
    "got10k": Format(",", 4),
    "trackingnet": Format(",", 2),
}


def write_boxes(
    path: str | Path, boxes: Boxes, format: FormatName = "lasot", rounding: Rounding = "none"
) -> Path:
    """Write `xywh` boxes that are in the file's convention already."""
    return write_text_atomically(path, boxes_text(boxes, format, rounding))


def boxes_text(boxes: Boxes, format: FormatName = "lasot", rounding: Rounding = "none") -> str:
    """Return what a result file holds."""
    style = FORMATS[format]
    decimals = style.decimals if rounding == "none" else 0
    return _text(_rounded(boxes, rounding), style.separator, decimals)


def write_times(path: str | Path, seconds: npt.ArrayLike) -> Path:
    """Write the seconds of each frame, one column per repetition."""
    return write_text_atomically(path, times_text(seconds))


def times_text(seconds: npt.ArrayLike) -> str:
    """Return what a file of seconds holds."""
    columns = np.asarray(seconds, dtype=np.float64)
    return _text(columns.reshape(len(columns), -1), ",", TIME_DECIMALS)


def read_times(path: str | Path) -> Float[np.ndarray, "frames repeats"]:
    """Read the seconds of each frame, one column per repetition."""
    return read_rows(Path(path), (1, 2, 3))


def _rounded(boxes: Boxes, rounding: Rounding) -> Boxes:
    """Return boxes truncated, or grown to whole pixels; adding zero makes -0 a plain 0."""
    boxes = np.asarray(boxes, dtype=np.float64)
    if rounding == "int":
        return np.trunc(boxes) + 0.0
    if rounding == "outward":
        corner = np.floor(boxes[:, :2])
        far = np.floor(boxes[:, :2] + boxes[:, 2:] + 1.0 - OUTWARD_SLACK)
        return np.concatenate([corner, far - corner], axis=1) + 0.0
    return boxes


def _text(table: Float[np.ndarray, "rows columns"], separator: str, decimals: int) -> str:
    """Return lines of numbers."""
    lines = (separator.join(f"{value:.{decimals}f}" for value in row) for row in table.tolist())
    return "".join(f"{line}\n" for line in lines)
