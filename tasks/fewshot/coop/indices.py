"""All images of a data set with their classes, from its own lists or folders.

Used where CoOp's split file is missing. Class order and names follow CoOp, and so does whether
the data set's own test images are kept (`test`) or everything is pooled and divided anew.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.fewshot.folder import class_files
from tasks.fewshot.sampling import Item
from visionlora.errors import ConfigError, DataError

CALTECH_DROPPED = frozenset({"BACKGROUND_Google", "Faces_easy"})
CALTECH_RENAMED = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
EUROSAT_RENAMED = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


@dataclass(frozen=True)
class Index:
    """Class names in label order, and labelled images; without `test` they are one pool."""

    names: tuple[str, ...]
    train: list[Item]
    test: list[Item]


def folders(home: Path, images: Path) -> Index:
    """One folder per class, in the order of their names."""
    return _tree(images, {})


def caltech(home: Path, images: Path) -> Index:
    """Caltech101 without its background class and its second set of faces."""
    return _tree(images, CALTECH_RENAMED, CALTECH_DROPPED)


def eurosat(home: Path, images: Path) -> Index:
    """EuroSAT with the long names of its classes."""
    return _tree(images, EUROSAT_RENAMED)


def pets(home: Path, images: Path) -> Index:
    """Oxford Pets: `annotations/{trainval,test}.txt`, lines `Breed_name_7 label species id`."""
    names: dict[int, str] = {}

    def read(part: str) -> list[Item]:
        found = []
        for line in _lines(home / "annotations" / f"{part}.txt"):
            picture, label = line.split()[:2]
            names[int(label) - 1] = picture.rpartition("_")[0].lower()
            found.append(Item(images / f"{picture}.jpg", int(label) - 1))
        return found

    train, test = read("trainval"), read("test")
    return Index(_in_order(names, home), train, test)


def cars(home: Path, images: Path) -> Index:
    """Stanford Cars: MATLAB lists of the development kit; the year moves to the front."""
    spoken = [str(name) for name in _matlab(home / "devkit" / "cars_meta.mat")["class_names"]]
    names = tuple(" ".join([name.split()[-1], *name.split()[:-1]]) for name in spoken)

    def read(folder: str, file: Path) -> list[Item]:
        rows = _matlab(file)["annotations"]
        return [Item(home / folder / str(row["fname"]), int(row["class"]) - 1) for row in rows]

    train = read("cars_train", home / "devkit" / "cars_train_annos.mat")
    return Index(names, train, read("cars_test", home / "cars_test_annos_withlabels.mat"))


def flowers(home: Path, images: Path) -> Index:
    """Oxford Flowers: `imagelabels.mat`, names from `cat_to_name.json` or from torchvision."""
    labels = [int(label) - 1 for label in _matlab(home / "imagelabels.mat")["labels"]]
    file = home / "cat_to_name.json"
    if file.is_file():
        given = json.loads(file.read_text(encoding="utf-8"))
        names = tuple(given[str(label + 1)] for label in range(max(labels) + 1))
    else:
        from torchvision.datasets import Flowers102

        names = tuple(Flowers102.classes)
    items = [Item(images / f"image_{i:05d}.jpg", label) for i, label in enumerate(labels, 1)]
    return Index(names, items, [])


def sun(home: Path, images: Path) -> Index:
    """SUN397: `/a/abbey` is "abbey", `/c/church/indoor` "indoor church"; its official test images.

    torchvision's download has the class list only, so there all images are one pool.
    """
    lists = [folder for folder in (home, images) if (folder / "ClassName.txt").is_file()]
    classes = [line.lstrip("/") for line in _lines((lists or [home])[0] / "ClassName.txt")]
    labels = {name: label for label, name in enumerate(classes)}
    names = tuple(" ".join(reversed(name.split("/")[1:])) for name in classes)

    def read(part: str) -> list[Item]:
        pictures = [line.lstrip("/") for line in _lines(home / f"{part}_01.txt")]
        return [Item(images / name, labels[str(Path(name).parent)]) for name in pictures]

    if (home / "Training_01.txt").is_file():
        return Index(names, read("Training"), read("Testing"))
    pool = [
        Item(file, label)
        for label, name in enumerate(classes)
        for file in sorted((images / name).glob("*.jpg"))
    ]
    return Index(names, pool, [])


def ucf(home: Path, images: Path) -> Index:
    """UCF101: the first of the three official splits; `ApplyLipstick` is "Apply Lipstick"."""
    lists = home / "ucfTrainTestlist"
    labels = {
        name: int(label) - 1 for label, name in map(str.split, _lines(lists / "classInd.txt"))
    }
    folder = {name: "_".join(re.findall("[A-Z][^A-Z]*", name)) for name in labels}

    def read(part: str) -> list[Item]:
        found = []
        for line in _lines(lists / f"{part}01.txt"):
            action, _, video = line.split()[0].partition("/")
            picture = images / folder[action] / video.replace(".avi", ".jpg")
            found.append(Item(picture, labels[action]))
        return found

    names = _in_order({label: folder[name] for name, label in labels.items()}, lists)
    return Index(names, read("trainlist"), read("testlist"))


def _tree(images: Path, renamed: dict[str, str], dropped: frozenset[str] = frozenset()) -> Index:
    tree = {name: files for name, files in class_files(images).items() if name not in dropped}
    if empty := [name for name, files in tree.items() if not files]:
        raise DataError(f"class {empty[0]!r} in {images} has no images")
    items = [Item(file, label) for label, name in enumerate(tree) for file in tree[name]]
    return Index(tuple(renamed.get(name, name) for name in tree), items, [])


def _in_order(names: dict[int, str], where: Path) -> tuple[str, ...]:
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"the lists in {where} have labels {sorted(names)[:5]}..., expected 1, 2, ..."
        )
    return tuple(names[label] for label in sorted(names))


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file that are no comments."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def _matlab(file: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(f"reading {file} needs scipy: pip install scipy") from error
    found: dict[str, Any] = loadmat(str(file), squeeze_me=True)
    return found
