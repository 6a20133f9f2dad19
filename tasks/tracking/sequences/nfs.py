"""NFS, "Need for Speed" (Kiani Galoogahi et al. 2017, arXiv 1703.05884): 100 videos at 30 fps.

```
<root>/<video>/30/<video>/00001.jpg ...
<root>/<video>/30/<video>.txt      id xmin ymin xmax ymax frame lost occluded generated "label"
```
The annotation (of the VATIC tool) counts the frames of the 240 fps video from 1, so every eighth
line belongs to a frame of the 30 fps one. Boxes that were converted before are read too:
`<root>/sequences/<video>/00001.jpg` with `<root>/anno/nfs_<video>.txt`, `x,y,w,h` per frame.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from tasks.tracking.sequences.found import Found, folders, shipped
from tasks.tracking.sequences.frames import all_numbered, numbered
from tasks.tracking.sequences.sequence import Frames, Sequence
from tasks.tracking.sequences.text import read_boxes, read_text
from visionlora.errors import DataError

LAYOUT = "ROOT/<video>/30/<video>/00001.jpg and ROOT/<video>/30/<video>.txt"
STEP = 8
"""Frames at 240 fps for one at 30 fps."""


def lengths() -> dict[str, int]:
    """Return the 100 videos and their frames at 30 fps."""
    rows = (line.split() for line in shipped("nfs.txt"))
    return {name: int(frames) for name, frames in rows}


def names() -> tuple[str, ...]:
    """Return the names of the 100 videos."""
    return tuple(lengths())


def find(root: Path) -> Found:
    """Return the annotation file of each video."""
    found = {file.stem.removeprefix("nfs_"): file for file in sorted((root / "anno").glob("*.txt"))}
    for folder in folders(root):
        if (folder / "30").is_dir():
            found[folder.name] = folder / "30" / f"{folder.name}.txt"
    return found


def read(name: str, annotation: Path) -> Sequence:
    """Read a video; boxes beyond its last frame are left out.

    Raises:
        DataError: frames are missing, or the first one has no box.
    """
    home = annotation.parent
    if home.name == "anno":
        boxes, folder = read_boxes(annotation), home.parent / "sequences" / name
    else:
        boxes, folder = read_vatic(annotation), home / name
    frames: Frames
    if length := lengths().get(name):
        frames = numbered(folder, 5, range(1, length + 1))
    else:
        frames = all_numbered(folder, 5, first=1)
    count = min(len(frames), len(boxes))
    return Sequence(name, frames[:count], boxes[:count], benchmark="nfs")


def read_vatic(path: Path) -> Float[np.ndarray, "frames 4"]:
    """Return the boxes of every eighth frame; NaN where the annotation leaves one out.

    Raises:
        DataError: a line cannot be read, or there is none for the first frame.
    """
    found: dict[int, list[float]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            _, left, top, right, bottom, frame = map(float, line.split('"')[0].split()[:6])
        except ValueError:
            raise DataError(
                f"{path} line {number}: expected id xmin ymin xmax ymax frame ..., got {line!r}"
            ) from None
        if (int(frame) - 1) % STEP == 0:
            found[(int(frame) - 1) // STEP] = [left, top, right - left, bottom - top]
    if 0 not in found:
        raise DataError(f"{path} has no box for the first frame")
    nothing = [np.nan] * 4
    return np.array([found.get(frame, nothing) for frame in range(max(found) + 1)])
