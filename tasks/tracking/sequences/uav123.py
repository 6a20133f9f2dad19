"""UAV123 and UAV20L (Mueller, Smith & Ghanem, ECCV 2016).

```
<root>/data_seq/UAV123/<video>/000001.jpg ...
<root>/anno/UAV123/<sequence>.txt                  x,y,w,h; NaN where the object is not visible
<root>/anno/UAV20L/<sequence>.txt
```
The 123 sequences are parts of 91 videos: `bird1_2` is frames 775 to 1477 of `bird1`. Which part
stands in the benchmark's `configSeqs.m`; `lists/uav123.txt` has these numbers. Sequences of UAV20L
are whole videos.
"""

from pathlib import Path
from typing import NamedTuple

from tasks.tracking.sequences.found import Found, shipped
from tasks.tracking.sequences.frames import numbered
from tasks.tracking.sequences.sequence import Sequence
from tasks.tracking.sequences.text import read_boxes
from visionlora.errors import DataError

LAYOUT = "ROOT/data_seq/UAV123/<video>/000001.jpg and ROOT/anno/{}/<sequence>.txt"


class Part(NamedTuple):
    """The frames `start` to `end` of a video, both included and counted from 1."""

    video: str
    start: int
    end: int
    attributes: tuple[str, ...]


def parts() -> dict[str, Part]:
    """Return the 123 sequences."""
    rows = (line.split() for line in shipped("uav123.txt"))
    return {row[0]: Part(row[1], int(row[2]), int(row[3]), tuple(row[4:])) for row in rows}


def names() -> tuple[str, ...]:
    """Return the names of the 123 sequences."""
    return tuple(parts())


def find(root: Path) -> Found:
    """Return the annotation files of UAV123."""
    return _annotations(root, "UAV123")


def find_long(root: Path) -> Found:
    """Return the annotation files of UAV20L."""
    return _annotations(root, "UAV20L")


def read(name: str, annotation: Path) -> Sequence:
    """Read a sequence of UAV123; one that is not among the 123 is a whole video of that name.

    Raises:
        DataError: frames are missing, or the annotation has not as many boxes as the part frames.
    """
    part = parts().get(name)
    boxes = read_boxes(annotation)
    if part is None:
        part = Part(name, 1, len(boxes), ())
    count = part.end - part.start + 1
    if len(boxes) != count:
        raise DataError(
            f"{annotation} has {len(boxes)} boxes; {name} is frames {part.start} to {part.end} of "
            f"{part.video}, which are {count}"
        )
    frames = numbered(_video(annotation, part.video), 6, range(part.start, part.end + 1))
    return Sequence(name, frames, boxes, attributes=part.attributes, benchmark="uav123")


def read_long(name: str, annotation: Path) -> Sequence:
    """Read a sequence of UAV20L."""
    boxes = read_boxes(annotation)
    frames = numbered(_video(annotation, name), 6, range(1, len(boxes) + 1))
    return Sequence(name, frames, boxes, benchmark="uav20l")


def _annotations(root: Path, subset: str) -> Found:
    home = root / "UAV123" if (root / "UAV123" / "anno").is_dir() else root
    return {file.stem: file for file in sorted((home / "anno" / subset).glob("*.txt"))}


def _video(annotation: Path, video: str) -> Path:
    return annotation.parents[2] / "data_seq" / "UAV123" / video
