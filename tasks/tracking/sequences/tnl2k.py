"""TNL2K (Wang et al. 2021, arXiv 2103.16746): 700 test sequences, described in words as well.

```
<root>/<sequence>/imgs/*.jpg or *.png     any names, in the order of their numbers
                  groundtruth.txt         x,y,w,h for every frame
```
The sequences may lie in `<root>/TNL2K_test_subset` or `<root>/test`.
"""

from pathlib import Path

from tasks.tracking.sequences.found import Found, with_any
from tasks.tracking.sequences.frames import listed, match
from tasks.tracking.sequences.sequence import Sequence
from tasks.tracking.sequences.text import read_boxes

LAYOUT = "ROOT/<sequence>/ (or ROOT/test/<sequence>/) with imgs/ and groundtruth.txt"
RULE = "TNL2K has a box for every image of imgs/"
SUBSETS = ("TNL2K_test_subset", "test")


def find(root: Path) -> Found:
    """Return the folders of the test sequences."""
    home = next((root / subset for subset in SUBSETS if (root / subset).is_dir()), root)
    return with_any(home, ("imgs", "groundtruth.txt"))


def read(name: str, folder: Path) -> Sequence:
    """Read a sequence."""
    frames = listed(folder / "imgs")
    boxes = read_boxes(folder / "groundtruth.txt")
    match(frames, len(boxes), name, RULE)
    return Sequence(name, frames, boxes, benchmark="tnl2k")
