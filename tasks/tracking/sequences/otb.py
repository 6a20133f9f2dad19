"""OTB-100 (Wu, Lim & Yang, "Object Tracking Benchmark", TPAMI 2015).

```
<root>/<Video>/img/0001.jpg ...
               groundtruth_rect.txt                            commas, tabs or spaces
               groundtruth_rect.1.txt groundtruth_rect.2.txt   videos with two targets
```
The boxes say how many frames there are. Some videos are not annotated from their first frame.
"""

from pathlib import Path

from tasks.tracking.sequences.found import Found, shipped_attributes, with_any
from tasks.tracking.sequences.frames import numbered
from tasks.tracking.sequences.sequence import Sequence
from tasks.tracking.sequences.text import read_boxes

LAYOUT = "ROOT/<Video>/ with img/0001.jpg and groundtruth_rect.txt"
FIRST_FRAME = {"BlurCar1": 247, "BlurCar3": 3, "BlurCar4": 18, "David": 300}
"""Frame of the first box, where that is not the first one."""
LEFT_OUT = {"Tiger1": 5}
"""Boxes that the benchmark does not use, at the start."""
TARGETS = {"Human4": (2,), "Jogging": (1, 2), "Skating2": (1, 2)}
"""Targets of videos whose annotation files are numbered; of Human4 only the second is used."""
DIGITS = {"Board": 5}


def names() -> tuple[str, ...]:
    """Return the 100 sequences; the targets of a video are called `Jogging_1`, `Jogging_2`."""
    return tuple(shipped_attributes("otb100.txt"))


def find(root: Path) -> Found:
    """Return the annotation file of each sequence."""
    found: Found = {}
    for video, folder in with_any(root, ("img", "groundtruth_rect.txt")).items():
        if video in TARGETS:
            for target in TARGETS[video]:
                found[f"{video}_{target}"] = folder / f"groundtruth_rect.{target}.txt"
        else:
            found[video] = folder / "groundtruth_rect.txt"
    return found


def read(name: str, annotation: Path) -> Sequence:
    """Read a sequence."""
    video = annotation.parent.name
    start, skip = FIRST_FRAME.get(video, 1), LEFT_OUT.get(video, 0)
    boxes = read_boxes(annotation)
    numbers = range(start, start + len(boxes))
    return Sequence(
        name=name,
        frames=numbered(annotation.parent / "img", DIGITS.get(video, 4), numbers)[skip:],
        boxes=boxes[skip:],
        attributes=shipped_attributes("otb100.txt").get(name, ()),
        benchmark="otb",
    )
