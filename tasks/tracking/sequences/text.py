"""Numbers and names out of the text files of benchmarks; a mistake is told with its line.

Values may be separated by commas, tabs or spaces, whatever the benchmark says. Eight numbers on a
line are the corners of a quadrilateral, as in VOT, and are read as its axis-aligned hull.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from visionlora.errors import DataError


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_names(path: Path) -> list[str]:
    """Return the lines that are not empty; the last one counts with or without a line end."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_boxes(path: Path) -> Float[np.ndarray, "n 4"]:
    """Return the box of every line, as the file has it; NaN where a line says so.

    Raises:
        DataError: the file is missing, empty, or a line has not 4 (or 8) numbers.
    """
    rows = read_rows(path, (4, 8))
    if rows.shape[1] == 4:
        return rows
    x, y = rows[:, 0::2], rows[:, 1::2]
    left, top = x.min(axis=1), y.min(axis=1)
    return np.stack([left, top, x.max(axis=1) - left, y.max(axis=1) - top], axis=1)


def read_rows(path: Path, widths: tuple[int, ...]) -> Float[np.ndarray, "n width"]:
    """Return the numbers of all lines; every line has as many as the first, one of `widths`."""
    text = read_text(path).rstrip().replace(",", " ")
    if not text:
        raise DataError(f"{path} is empty")
    lines = text.splitlines()
    try:
        values = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError:
        raise DataError(f"{path} {_mistake(lines, widths)}") from None
    if values.shape[1] not in widths or len(values) != len(lines) or np.isinf(values).any():
        raise DataError(f"{path} {_mistake(lines, widths)}")
    return values


def read_flags(path: Path, count: int, of: str = "boxes") -> Bool[np.ndarray, "count"]:
    """Return 0/1 flags, all on one line or one per line, one for each of `count` things.

    Raises:
        DataError: something else than 0 and 1, or not `count` of them.
    """
    words = read_text(path).replace(",", " ").split()
    if wrong := next((word for word in words if word not in ("0", "1")), None):
        raise DataError(f"{path}: flags are 0 or 1, not {_quoted(wrong)}")
    if len(words) != count:
        raise DataError(f"{path} has {len(words)} flags for {count} {of}")
    return np.array(words) == "1"


def _mistake(lines: list[str], widths: tuple[int, ...]) -> str:
    """Say what the first line is that cannot be read, and why."""
    first = len(lines[0].split())
    expected = str(first) if first in widths else " or ".join(map(str, widths))
    for number, line in enumerate(lines, 1):
        values = line.split()
        if len(values) != first or first not in widths:
            return f"line {number}: {len(values)} values, expected {expected}"
        for value in values:
            try:
                readable = not np.isinf(float(value))
            except ValueError:
                readable = False
            if not readable:
                return f"line {number}: {_quoted(value)} is not a number"
    return "cannot be read as lines of numbers"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
