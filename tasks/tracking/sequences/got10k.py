"""GOT-10k (Huang et al. 2019, arXiv 1810.11981).

```
<root>/{train,val,test}/list.txt                         names, one per line
<root>/val/GOT-10k_Val_000001/00000001.jpg ...           0-based x,y,w,h with decimals
                              groundtruth.txt            test: the first box only
                              absence.label cover.label  one number per line
                              meta_info.ini              resolution: (1920, 1080)
```
`cover.label` is 0 where nothing of the object can be seen and 8 where all of it can; scores count
the frames above 0. The root may also be the folder of the split itself.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from tasks.tracking.sequences.clean import clean
from tasks.tracking.sequences.found import Found, few, folders, shipped
from tasks.tracking.sequences.frames import all_numbered, image_size, numbered
from tasks.tracking.sequences.sequence import Sequence, Track
from tasks.tracking.sequences.text import read_boxes, read_names, read_rows, read_text
from visionlora.errors import DataError

TRAINING_SEQUENCES = 9335


def layout(split: str) -> str:
    """Return what is expected on disk for a split."""
    return (
        f"ROOT/{split}/list.txt and ROOT/{split}/GOT-10k_{split.capitalize()}_000001/"
        "00000001.jpg with groundtruth.txt"
    )


def names(root: Path, split: str) -> tuple[str, ...]:
    """Return the sequences of `list.txt`, or of the folder where there is no such file."""
    home = _home(root, split)
    if (home / "list.txt").is_file():
        listed = tuple(read_names(home / "list.txt"))
        if wrong := next((name for name in listed if Path(name).name != name), None):
            raise DataError(f"{home / 'list.txt'}: {wrong!r} is not the name of a folder")
        return listed
    return tuple(folder.name for folder in folders(home) if folder.name.startswith("GOT-10k_"))


def find(root: Path, split: str) -> Found:
    """Return those of the sequences `names` that have a folder."""
    home = _home(root, split)
    return {name: home / name for name in names(root, split) if (home / name).is_dir()}


def find_training(root: Path) -> Found:
    """Return all training sequences, or none where there is no list and no folder.

    Raises:
        DataError: some of `list.txt` are missing.
    """
    return _complete(root, names(root, "train"))


def find_vot_safe(root: Path) -> Found:
    """Return the 7,086 training sequences that trackers for VOT are trained on.

    Raises:
        DataError: the list of all training sequences is not complete.
    """
    every = names(root, "train")
    return _complete(root, vot_safe(every)) if every else {}


def vot_safe(every: tuple[str, ...]) -> tuple[str, ...]:
    """Choose from the list of all training sequences by the shipped places, counted from 0."""
    if len(every) != TRAINING_SEQUENCES:
        raise DataError(
            f"GOT-10k: the VOT-safe sequences are chosen by their places among all "
            f"{TRAINING_SEQUENCES} of train/list.txt, and {len(every)} are listed"
        )
    places = (int(place) for line in shipped("got10k_vot.txt") for place in line.split())
    return tuple(every[place] for place in places)


def read_validation(name: str, folder: Path) -> Sequence:
    """Read a sequence whose boxes are public."""
    return _read(name, folder, "got10k_val")


def read_test(name: str, folder: Path) -> Sequence:
    """Read a sequence of the test split, which has its first box only."""
    return _read(name, folder, "got10k")


def read_training(name: str, folder: Path) -> Track | None:
    """Read a track for training; frames that `absence.label` marks do not count."""
    boxes = read_boxes(folder / "groundtruth.txt")
    frames = numbered(folder, 8, range(1, len(boxes) + 1), check=False)
    absence = _labels(folder / "absence.label", len(boxes))
    exists = None if absence is None else absence == 0
    return clean(name, frames, boxes, exists, _resolution(folder, frames[0]), "got10k")


def _read(name: str, folder: Path, benchmark: str) -> Sequence:
    boxes = read_boxes(folder / "groundtruth.txt")
    if len(boxes) == 1:
        return Sequence(name, all_numbered(folder, 8, first=1), boxes, benchmark=benchmark)
    frames = numbered(folder, 8, range(1, len(boxes) + 1))
    return Sequence(name, frames, boxes, _unseen(folder, len(boxes)), benchmark=benchmark)


def _unseen(folder: Path, count: int) -> Bool[np.ndarray, "count"] | None:
    cover = _labels(folder / "cover.label", count)
    if cover is not None:
        return cover == 0
    absence = _labels(folder / "absence.label", count)
    return None if absence is None else absence != 0


def _labels(path: Path, count: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    values = read_rows(path, (1,))[:, 0]
    if len(values) != count:
        raise DataError(f"{path} has {len(values)} lines for {count} boxes; there is one per box")
    return values


def _resolution(folder: Path, first: Path) -> tuple[int, int]:
    """Return width and height from `meta_info.ini`, or from the first frame."""
    file = folder / "meta_info.ini"
    if file.is_file() and (size := re.search(r"resolution:\s*\((\d+),\s*(\d+)\)", read_text(file))):
        return int(size[1]), int(size[2])
    return image_size(first)


def _home(root: Path, split: str) -> Path:
    return root / split if (root / split).is_dir() else root


def _complete(root: Path, wanted: tuple[str, ...]) -> Found:
    found = find(root, "train")
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"GOT-10k: {len(missing)} of {len(wanted)} training sequences are missing in "
            f"{_home(root, 'train')}: {few(missing)}"
        )
    return {name: found[name] for name in wanted}
