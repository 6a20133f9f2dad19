"""TrackingNet (Mueller et al. 2018, arXiv 1803.10794).

```
<root>/TEST/frames/<sequence>/0.jpg 1.jpg ...      511 sequences; scored by a server
<root>/TEST/anno/<sequence>.txt                    x,y,w,h of the first frame only
<root>/TRAIN_0/ ... TRAIN_11/                      the same, with a box for every frame
```
Training takes the chunks that are there: many trackers were trained on the first four.
"""

from pathlib import Path

from tasks.tracking.sequences.clean import clean
from tasks.tracking.sequences.found import Found
from tasks.tracking.sequences.frames import all_numbered, image_size, numbered
from tasks.tracking.sequences.sequence import Sequence, Track
from tasks.tracking.sequences.text import read_boxes

LAYOUT = "ROOT/TEST/anno/<sequence>.txt and ROOT/TEST/frames/<sequence>/0.jpg"
TRAINING_LAYOUT = "ROOT/TRAIN_0/anno/<sequence>.txt and ROOT/TRAIN_0/frames/<sequence>/0.jpg"
CHUNKS = 12


def find(root: Path) -> Found:
    """Return the annotation files of the test sequences."""
    return _annotations(root / "TEST" if (root / "TEST").is_dir() else root)


def find_training(root: Path) -> Found:
    """Return the annotation files of all chunks that are there."""
    found: Found = {}
    for chunk in range(CHUNKS):
        found |= _annotations(root / f"TRAIN_{chunk}")
    return found


def read(name: str, annotation: Path) -> Sequence:
    """Read a test sequence: all frames that are there, and the first box."""
    boxes = read_boxes(annotation)
    folder = _frames(annotation)
    frames = (
        all_numbered(folder, 0, first=0)
        if len(boxes) == 1
        else numbered(folder, 0, range(len(boxes)))
    )
    return Sequence(name, frames, boxes, benchmark="trackingnet")


def read_training(name: str, annotation: Path) -> Track | None:
    """Read a track for training."""
    boxes = read_boxes(annotation)
    frames = numbered(_frames(annotation), 0, range(len(boxes)), check=False)
    return clean(name, frames, boxes, None, image_size(frames[0]), "trackingnet")


def _annotations(chunk: Path) -> Found:
    return {file.stem: file for file in sorted((chunk / "anno").glob("*.txt"))}


def _frames(annotation: Path) -> Path:
    return annotation.parent.parent / "frames" / annotation.stem
