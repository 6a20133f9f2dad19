"""LaSOT and LaSOT_ext (Fan et al. 2019, arXiv 1809.07845; 2020, arXiv 2009.03465).

```
<root>/<class>/<class>-<n>/img/00000001.jpg ...      or flat: <root>/<sequence>/img/...
                           groundtruth.txt           x,y,w,h per line, 1-based
                           full_occlusion.txt        0/1 per frame, on one line
                           out_of_view.txt           the same; without the files all is visible
```
The annotation says how many frames there are: monkey-17 has more images than boxes. The object is
absent where it is fully occluded or out of view. The toolkit keeps annotations without frames:
`annos/<sequence>.txt`, `annos/absent/<sequence>.txt`, `annos/att/<sequence>.txt`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tasks.tracking.sequences.clean import clean
from tasks.tracking.sequences.found import Found, shipped, shipped_attributes, with_any
from tasks.tracking.sequences.frames import image_size, numbered
from tasks.tracking.sequences.sequence import Sequence, Track
from tasks.tracking.sequences.text import read_boxes, read_flags

LAYOUT = "ROOT/<class>/<sequence>/ or ROOT/<sequence>/ with img/00000001.jpg and groundtruth.txt"
ORIGIN = 1
ATTRIBUTES = (
    *("IV", "POC", "DEF", "MB", "CM", "ROT", "BC"),
    *("VC", "SV", "FOC", "FM", "OV", "LR", "ARC"),
)
"""Order of the toolkit's `att` files."""


class Annotation(NamedTuple):
    """What is known of a sequence without its frames; boxes 0-based."""

    boxes: Float[np.ndarray, "n 4"]
    absent: Bool[np.ndarray, "n"]
    attributes: tuple[str, ...]


def testing_set() -> tuple[str, ...]:
    """Return the 280 names of LaSOT's test set; all other sequences are for training."""
    return shipped("lasot_testing_set.txt")


def extension_set() -> tuple[str, ...]:
    """Return the 150 names of LaSOT_ext, all of them for testing."""
    return tuple(shipped_attributes("lasot_ext_attributes.txt"))


def find(root: Path) -> Found:
    """Return the sequences below `root`, nested in classes or flat."""
    return with_any(root, ("groundtruth.txt", "img"))


def find_training(root: Path) -> Found:
    """Return the sequences below `root` that are not in the test set."""
    testing = set(testing_set())
    return {name: folder for name, folder in find(root).items() if name not in testing}


def read(name: str, folder: Path) -> Sequence:
    """Read a sequence of LaSOT, or of one's own in this layout.

    Raises:
        DataError: annotation or frames are missing or disagree.
    """
    return _read(name, folder, "lasot", ORIGIN)


def read_extension(name: str, folder: Path) -> Sequence:
    """Read a sequence of LaSOT_ext, whose files are compared as if they were 0-based."""
    return _read(name, folder, "lasot_ext", 0)


def read_training(name: str, folder: Path) -> Track | None:
    """Read a track for training; None where nothing usable is annotated."""
    boxes, absent = _read_boxes(folder, ORIGIN)
    frames = numbered(folder / "img", 8, range(1, len(boxes) + 1), check=False)
    return clean(name, frames, boxes, ~absent, image_size(frames[0]), "lasot")


def read_annotation(annos: Path, name: str) -> Annotation:
    """Read the toolkit's files of one sequence, which come without frames."""
    boxes = read_boxes(annos / f"{name}.txt") - np.array([ORIGIN, ORIGIN, 0, 0])
    flags = read_flags(annos / "att" / f"{name}.txt", len(ATTRIBUTES), "attributes")
    return Annotation(
        boxes,
        read_flags(annos / "absent" / f"{name}.txt", len(boxes)),
        tuple(attribute for attribute, flag in zip(ATTRIBUTES, flags, strict=True) if flag),
    )


def _read(name: str, folder: Path, benchmark: str, origin: int) -> Sequence:
    boxes, absent = _read_boxes(folder, origin)
    attributes = shipped_attributes(
        "lasot_test_attributes.txt" if benchmark == "lasot" else "lasot_ext_attributes.txt"
    )
    return Sequence(
        name=name,
        frames=numbered(folder / "img", 8, range(1, len(boxes) + 1)),
        boxes=boxes,
        absent=absent,
        origin=origin,
        attributes=attributes.get(name, ()),
        benchmark=benchmark,
    )


def _read_boxes(
    folder: Path, origin: int
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, "n"]]:
    boxes = read_boxes(folder / "groundtruth.txt") - np.array([origin, origin, 0, 0])
    absent = np.zeros(len(boxes), dtype=bool)
    for file in ("full_occlusion.txt", "out_of_view.txt"):
        if (folder / file).exists():
            absent |= read_flags(folder / file, len(boxes))
    return boxes, absent
