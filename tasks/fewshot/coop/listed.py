"""Data sets whose own lists say which image is for what: ImageNet, its variants, FGVC Aircraft.

`classnames.txt` of ImageNet has one line per class, `n01440764 tench`. Labels are the order of the
class folders; in ImageNetV2 folder 7 is line 7. Variants with fewer classes count their own. Files
of a folder are taken in the order of their names, where CoOp takes what the file system yields.
"""

import os
from pathlib import Path

from tasks.fewshot.folder import IMAGE_SUFFIXES, Splits
from tasks.fewshot.sampling import Item
from visionlora.errors import DataError, nearest

CLASS_NAMES = "classnames.txt"


def read_imagenet(home: Path, images: Path) -> tuple[tuple[str, ...], Splits]:
    """Return ImageNet: its validation images are the test, and nothing is for validation."""
    names = read_class_names(home)
    train, test = images / "train", images / "val"
    if not test.is_dir():
        raise DataError(f"no folder {test}; ImageNet's validation images are the test images here")
    folders = _class_folders(train, names)
    if unknown := sorted(set(_class_folders(test, names)) - set(folders)):
        raise DataError(f"class {unknown[0]!r} is in {test} but not in {train}")
    splits: Splits = {
        "train": _items(train, folders),
        "val": [],
        "test": _items(test, folders),
    }
    return tuple(names[folder] for folder in folders), splits


def read_shifted(home: Path, images: Path, numbered: bool) -> tuple[tuple[str, ...], Splits]:
    """Return a variant of ImageNet, all of whose images are for testing."""
    names = read_class_names(home)
    if numbered:
        folders = [str(number) for number in range(len(names))]
        if missing := [folder for folder in folders if not (images / folder).is_dir()]:
            raise DataError(
                f"{CLASS_NAMES} names {len(names)} classes, but there is no folder "
                f"{images / missing[0]}"
            )
        classes = tuple(names.values())
    else:
        folders = _class_folders(images, names)
        classes = tuple(names[folder] for folder in folders)
    return classes, {"train": [], "val": [], "test": _items(images, folders)}


def read_aircraft(home: Path, images: Path) -> tuple[tuple[str, ...], Splits]:
    """Return FGVC Aircraft: `variants.txt` and `images_variant_{train,val,test}.txt`."""
    names = tuple(_text(home / "variants.txt").splitlines())
    labels = {name: label for label, name in enumerate(names)}
    splits: Splits = {}
    for part in ("train", "val", "test"):
        file = home / f"images_variant_{part}.txt"
        splits[part] = []
        for line in _text(file).splitlines():
            number, _, name = line.strip().partition(" ")
            if name not in labels:
                raise DataError(
                    f"{file} names {name!r}, which is not in variants.txt{nearest(name, names)}"
                )
            splits[part].append(Item(images / f"{number}.jpg", labels[name]))
    return names, splits


def read_class_names(home: Path) -> dict[str, str]:
    """Return the class name of every folder, from the file here or from ImageNet's."""
    places = [home / CLASS_NAMES, home.parent / "imagenet" / CLASS_NAMES]
    found = [place for place in places if place.is_file()]
    if not found:
        raise DataError(
            f"no {places[0]}; CoOp's list with lines such as 'n01440764 tench' is needed"
        )
    lines = [line.split() for line in _text(found[0]).splitlines() if line.strip()]
    if short := [words for words in lines if len(words) < 2]:
        raise DataError(f"{found[0]}: no class name after {short[0][0]!r}")
    return {words[0]: " ".join(words[1:]) for words in lines}


def _class_folders(images: Path, names: dict[str, str]) -> list[str]:
    if not images.is_dir():
        raise DataError(f"no folder {images}")
    folders = sorted(entry.name for entry in os.scandir(images) if entry.is_dir())
    if unknown := [folder for folder in folders if folder not in names]:
        raise DataError(
            f"class folder {unknown[0]!r} in {images} has no line in {CLASS_NAMES}"
            f"{nearest(unknown[0], names)}"
        )
    if not folders:
        raise DataError(f"{images} holds no class folders")
    return folders


def _items(images: Path, folders: list[str]) -> list[Item]:
    return [
        Item(images / folder / name, label)
        for label, folder in enumerate(folders)
        if (images / folder).is_dir()
        for name in sorted(entry.name for entry in os.scandir(images / folder))
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
