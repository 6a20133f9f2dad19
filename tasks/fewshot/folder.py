"""A folder of pictures as a data set: `train/val/test` splits, or one tree that is split here.

```
PATH/train/<class>/*.jpg   PATH/val/<class>/*   PATH/test/<class>/*      val is optional
PATH/<class>/*.jpg                               split 50/20/30 per class, always the same way
```
The class name in the prompt is the folder's name with `_` read as a space; a `classnames.json`
in PATH (`{"folder": "name to say"}`) overrides it.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tasks.fewshot.sampling import Item
from visionlora.errors import DataError, nearest

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_SEED = 1
SPLIT_SHARES = (0.5, 0.2)
"""Shares of training and validation images; the rest is for testing."""

LAYOUT = "expected PATH/<class>/*.jpg, or PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg"

Splits = dict[str, list[Item]]


def read_folder(path: str | Path) -> tuple[tuple[str, ...], Splits, bool]:
    """Return the class names, the items of `train`, `val`, `test`, and whether we split them.

    Raises:
        DataError: the folder is missing, empty, holds one class only, or its splits disagree.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        parent = root.parent
        names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        raise DataError(f"data folder {root} {what}{nearest(root.name, names)}; {LAYOUT}")
    splits = _split_folders(root)
    if "train" in splits:
        folders, found = _read_splits(root, splits)
    elif splits:
        raise DataError(f"{root} has {sorted(splits)} but no train folder; {LAYOUT}")
    else:
        tree = class_files(root)
        folders = sorted(tree)
        _check_classes(root, tree)
        found = split_tree(tree, root)
    own_split = "test" not in splits and "val" not in splits
    return _spoken_names(root, folders), found, own_split


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files below each class folder, in sorted order."""
    return {
        entry.name: list_images(entry)
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith((".", "__"))
    }


def list_images(folder: Path) -> list[Path]:
    """Return every image file below `folder`, in sorted order; hidden files are left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def split_tree(tree: dict[str, list[Path]], root: Path) -> Splits:
    """Split every class 50/20/30 with a fixed seed, classes in the order of their names."""
    return split_classes([(name, tree[name]) for name in sorted(tree)], root)


def split_classes(classes: Sequence[tuple[str, Sequence[Path]]], root: Path) -> Splits:
    """Split every class 50/20/30 with a fixed seed; one train and one test image at least."""
    found: Splits = {"train": [], "val": [], "test": []}
    rng = random.Random(SPLIT_SEED)
    for label, (name, paths) in enumerate(classes):
        files = list(paths)
        if len(files) < 2:
            raise DataError(
                f"class {name!r} in {root} has {len(files)} image: splitting it into training and "
                "test needs at least 2"
            )
        rng.shuffle(files)
        train = max(1, round(len(files) * SPLIT_SHARES[0]))
        val = min(round(len(files) * SPLIT_SHARES[1]), len(files) - train - 1)
        for split, part in (
            ("train", files[:train]),
            ("val", files[train : train + val]),
            ("test", files[train + val :]),
        ):
            found[split] += [Item(file, label) for file in sorted(part)]
    return found


def _split_folders(root: Path) -> dict[str, Path]:
    return {
        split: root / name
        for split, names in SPLIT_NAMES.items()
        for name in names
        if (root / name).is_dir()
    }


def _read_splits(root: Path, splits: dict[str, Path]) -> tuple[list[str], Splits]:
    trees = {split: class_files(folder) for split, folder in splits.items()}
    _check_classes(splits["train"], trees["train"])
    folders = sorted(trees["train"])
    if set(splits) == {"train"}:
        return folders, split_tree(trees["train"], splits["train"])
    for split, tree in trees.items():
        if unknown := sorted(set(tree) - set(folders)):
            raise DataError(
                f"class {unknown[0]!r} is in {splits[split]} but not in {splits['train']}"
                f"{nearest(unknown[0], folders)}"
            )
    found: Splits = {
        split: [
            Item(file, label)
            for label, name in enumerate(folders)
            for file in trees.get(split, {}).get(name, [])
        ]
        for split in SPLIT_NAMES
    }
    if "test" not in splits:
        found["test"], found["val"] = found["val"], []
    if not found["test"]:
        raise DataError(f"no test images in {splits.get('test', splits.get('val'))}; {LAYOUT}")
    return folders, found


def _check_classes(folder: Path, tree: dict[str, list[Path]]) -> None:
    if not any(tree.values()):
        loose = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())
        what = f"holds {loose} images but no class folders" if loose else "holds no images"
        raise DataError(f"{folder} {what}; {LAYOUT}")
    if empty := [name for name, files in tree.items() if not files]:
        raise DataError(f"class {empty[0]!r} in {folder} has no images")
    if len(tree) < 2:
        raise DataError(f"{folder} holds one class only ({next(iter(tree))!r}); at least 2 needed")


def _spoken_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    names = {folder: folder.replace("_", " ") for folder in folders}
    file = root / "classnames.json"
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise DataError(f'{file} must be {{"folder": "name to say"}}')
        if unknown := sorted(set(given) - set(names)):
            raise DataError(
                f"{file} names {unknown[0]!r}, which is no class{nearest(unknown[0], names)}"
            )
        names.update(given)
    return tuple(names[folder] for folder in folders)
