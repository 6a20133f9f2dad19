"""The results of one tracker, wherever its tools have put them.

```
DIR/<sequence>.txt                  ours, pytracking, LaSOT (also DIR/results/<sequence>.txt)
DIR/<prefix><sequence>.txt          pytracking: uav_, nfs_
DIR/<sequence>/<sequence>.txt       LoRAT for TrackingNet
DIR/<sequence>/<sequence>_001.txt   GOT-10k, up to three repetitions
... and <sequence>_time.txt beside them
```
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tasks.tracking.evaluation.result_files import Boxes, read_times
from tasks.tracking.sequences.text import read_boxes
from visionlora.errors import DataError, nearest

PREFIXES = {"uav123": "uav_", "nfs": "nfs_"}
"""What pytracking puts before the name of a sequence."""
SUFFIX = "_tracking_result"
"""What LaSOT's toolkit puts behind the name of a tracker."""
REPEATS = (1, 2, 3)
SHOWN = 3
"""Missing sequences named in a message."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a tracker said about one sequence, as the benchmark's files count."""

    repeats: tuple[Boxes, ...]
    """`xywh` of all frames, once per repetition."""
    seconds: Float[np.ndarray, "frames repeats"] | None = None


def tracker_name(folder: str | Path) -> str:
    """Return what the results in a folder are called."""
    path = Path(folder).resolve()
    path = path.parent if path.name == "results" else path
    return path.name.removesuffix(SUFFIX)


def find_files(
    folder: str | Path, sequences: Iterable[str], benchmark: str
) -> dict[str, list[Path]]:
    """Return the files of those sequences that have any, one per repetition.

    Raises:
        DataError: there is no such folder.
    """
    home = Path(folder).expanduser()
    if not home.is_dir():
        siblings = [entry.name for entry in home.parent.iterdir()] if home.parent.is_dir() else []
        raise DataError(f"no folder of results at {home}{nearest(home.name, siblings)}")
    inner = home / "results"
    home = inner if inner.is_dir() else home
    prefix = PREFIXES.get(benchmark, "")
    found = {}
    for name in sequences:
        single = (home / f"{name}.txt", home / f"{prefix}{name}.txt", home / name / f"{name}.txt")
        files = [path for path in single if path.is_file()][:1]
        repeats = (home / name / f"{name}_{number:03d}.txt" for number in REPEATS)
        if files := files or [path for path in repeats if path.is_file()]:
            found[name] = files
    return found


def missing_text(folder: str | Path, missing: Sequence[str], wanted: int) -> str:
    """Say which sequences have no result; the first with the nearest file there is."""
    names = [path.stem for path in Path(folder).expanduser().rglob("*.txt")]
    first = f"{missing[0]}{nearest(missing[0], names, count=1)}"
    rest = "".join(f", {name}" for name in missing[1:SHOWN])
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return f"{folder} has no result for {len(missing)} of {wanted} sequences: {first}{rest}{more}"


def read_result(files: Sequence[Path]) -> Result:
    """Read the repetitions of one sequence, and the seconds if they are there."""
    first = files[0]
    stem = first.stem.removesuffix(f"_{REPEATS[0]:03d}") if len(files) > 1 else first.stem
    times = [first.with_name(f"{name}_time.txt") for name in (stem, first.parent.name)]
    seconds = next((read_times(path) for path in times if path.is_file()), None)
    return Result(tuple(read_boxes(path) for path in files), seconds)
