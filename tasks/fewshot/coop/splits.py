"""Split files: CoOp's are read, own ones are made by CoOp's written rule and kept beside it.

    {"train": [["crab/image_0001.jpg", 1, "crab"], ...], "val": [...], "test": [...]}

Paths are relative to the folder of images, classes are in the order of the labels. The rule for
own splits: 50 % training, 20 % validation and 30 % test images of every class, or, where a data
set names its test images, these and a fifth of the others for validation.
"""

import contextlib
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tasks.fewshot.coop.indices import Index
from tasks.fewshot.folder import SPLIT_SEED, Splits, split_classes
from tasks.fewshot.sampling import Item, by_class
from visionlora.errors import DataError, OutputError
from visionlora.io.atomic import write_text_atomically

PARTS = ("train", "val", "test")
VALIDATION_SHARE = 0.2


def read_split_file(file: Path, images: Path) -> tuple[tuple[str, ...], Splits]:
    """Return class names and items of a split file.

    Raises:
        DataError: the file has another form, or names images that are not in `images`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = {
            part: [(str(path), int(y), str(c)) for path, y, c in content[part]] for part in PARTS
        }
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{file} is not a CoOp split file: {error!r}") from error
    names: dict[int, str] = {}
    for part in PARTS:
        for _, label, name in rows[part]:
            if names.setdefault(label, name) != name:
                raise DataError(f"{file} calls class {label} both {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{file} has labels {sorted(names)[:5]}..., expected 0, 1, 2, ...")
    splits = {
        part: [Item(images / path.lstrip("/"), label) for path, label, _ in rows[part]]
        for part in PARTS
    }
    for part in ("train", "test"):
        if not splits[part]:
            raise DataError(f"{file} has no {part} images")
    _check_there(file, images, splits)
    return tuple(names[label].replace("_", " ") for label in sorted(names)), splits


def divide(index: Index, where: Path) -> Splits:
    """Return an own split of all images."""
    if not index.test:
        groups = by_class(index.train)
        files = [
            [Path(str(item.source)) for item in groups.get(y, [])] for y in range(len(index.names))
        ]
        return split_classes(list(zip(index.names, files, strict=True)), where)
    rng = random.Random(SPLIT_SEED)
    splits: Splits = {"train": [], "val": [], "test": list(index.test)}
    for group in by_class(index.train).values():
        chosen = set(rng.sample(range(len(group)), round(len(group) * VALIDATION_SHARE)))
        for number, item in enumerate(group):
            splits["val" if number in chosen else "train"].append(item)
    return splits


def write_split_file(file: Path, names: tuple[str, ...], splits: Splits, images: Path) -> None:
    """Keep an own split; on a disk that cannot be written it is made again, always the same."""
    content = {
        part: [
            [Path(str(item.source)).relative_to(images).as_posix(), item.label, names[item.label]]
            for item in splits[part]
        ]
        for part in PARTS
    }
    with contextlib.suppress(OutputError):
        write_text_atomically(file, json.dumps(content) + "\n")


def _check_there(file: Path, images: Path, splits: Splits) -> None:
    """Look for the folders, and for one image of each class and part, that the file names."""
    wanted = [next(iter(group)) for part in PARTS for group in by_class(splits[part]).values()]
    folders = {Path(str(item.source)).parent for part in PARTS for item in splits[part]}
    paths: Iterable[Path] = [*sorted(folders), *(Path(str(item.source)) for item in wanted)]
    for path in paths:
        if not path.exists():
            raise DataError(f"{file} names {path.relative_to(images)}, which is not in {images}")
