"""Any folder of sequences: own data without a line of code.

```
<root>/<sequence>/*.jpg  or  <root>/<sequence>/{img,imgs,images,frames,color}/*.jpg
<root>/<sequence>/groundtruth.txt                 or groundtruth_rect.txt
```
Sequences may lie in folders of classes, and `root` may be one sequence. Any image names, in the
order of their numbers. One box per frame: `x,y,w,h` in pixels, 0-based, `nan,nan,nan,nan` where
there is none; eight numbers are the corners of a quadrilateral. A single line is the box of the
first frame: such a sequence can be tracked, not scored.
"""

from pathlib import Path

from tasks.tracking.sequences.clean import clean
from tasks.tracking.sequences.found import Found, with_any
from tasks.tracking.sequences.frames import image_size, listed, match
from tasks.tracking.sequences.sequence import Frames, Sequence, Track
from tasks.tracking.sequences.text import read_boxes
from visionlora.errors import DataError

TRUTH = ("groundtruth.txt", "groundtruth_rect.txt")
IMAGES = ("img", "imgs", "images", "frames", "color")
LAYOUT = "ROOT/<sequence>/ with images (in it, or in img/) and groundtruth.txt"
RULE = "a folder of one's own has a box for every frame, or one box for the first frame only"


def find(root: Path) -> Found:
    """Return the folders below `root` that hold boxes."""
    return with_any(root, TRUTH)


def read(name: str, folder: Path) -> Sequence:
    """Read a sequence of one's own.

    Raises:
        DataError: frames are missing, or there are more or fewer boxes than frames.
    """
    frames = _frames(folder)
    boxes = read_boxes(_truth(folder))
    if len(boxes) > 1:
        match(frames, len(boxes), name, RULE)
    return Sequence(name=name, frames=frames, boxes=boxes, benchmark="folder")


def read_training(name: str, folder: Path) -> Track | None:
    """Read a track for training."""
    sequence = read(name, folder)
    size = image_size(sequence.frames[0])
    return clean(name, sequence.frames, sequence.boxes, None, size, "folder")


def _frames(folder: Path) -> Frames:
    return listed(next((folder / sub for sub in IMAGES if (folder / sub).is_dir()), folder))


def _truth(folder: Path) -> Path:
    for file in TRUTH:
        if (folder / file).is_file():
            return folder / file
    raise DataError(f"no {' or '.join(TRUTH)} in {folder}")
