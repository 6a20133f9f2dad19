"""The public few-shot benchmarks, from CoOp's folders or from torchvision's downloads.

With CoOp's `split_zhou_*.json` beside the images its split is used, so that shots equal the
published ones. Otherwise torchvision fetches the images and they are split by CoOp's written
rule, which is marked as an own split: 50/20/30 per class, or the official test images with a
fifth of the training images for validation.
"""

import json
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.fewshot.folder import SPLIT_SEED, Splits, class_files, split_tree
from tasks.fewshot.sampling import Item, by_class
from visionlora.errors import ConfigError, DataError

DOWNLOAD_TIMEOUT = 30.0
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class PublicSet:
    """Where a public data set lies and how its classes are asked for."""

    coop_folder: str
    images: str
    split_file: str | None
    template: str
    torchvision: str | None = None
    """Name of the torchvision class that downloads it."""
    parts: tuple[str, ...] = ()
    """torchvision's split arguments; two of them are (train, test), three (train, val, test)."""
    pooled: bool = False
    """All parts are pooled and split again, as CoOp does for this set."""
    tree: str | None = None
    """Class folders, relative to the root, where torchvision's own index is not needed."""


PUBLIC_SETS: dict[str, PublicSet] = {
    "caltech101": PublicSet(
        "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}.",
        "Caltech101", tree="caltech101/101_ObjectCategories",
    ),
    "pets": PublicSet(
        "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet.",
        "OxfordIIITPet", ("trainval", "test"),
    ),
    "flowers102": PublicSet(
        "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
        "a photo of a {}, a type of flower.", "Flowers102", ("train", "val", "test"), pooled=True,
    ),
    "food101": PublicSet(
        "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food.",
        "Food101", ("train", "test"), pooled=True,
    ),
    "aircraft": PublicSet(
        "fgvc_aircraft", "images", None, "a photo of a {}, a type of aircraft.",
        "FGVCAircraft", ("train", "val", "test"),
    ),
    "sun397": PublicSet(
        "sun397", "SUN397", "split_zhou_SUN397.json", "a photo of a {}.", "SUN397", pooled=True,
    ),
    "dtd": PublicSet(
        "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture.",
        "DTD", ("train", "val", "test"), pooled=True,
    ),
    "eurosat": PublicSet(
        "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}.",
        "EuroSAT", tree="eurosat/2750",
    ),
    "cars": PublicSet(
        "stanford_cars", ".", "split_zhou_StanfordCars.json", "a photo of a {}.",
    ),
    "ucf101": PublicSet(
        "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json",
        "a photo of a person doing {}.",
    ),
}  # fmt: skip

RENAMED = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
DROPPED = frozenset({"BACKGROUND_Google", "Faces_easy"})


def read_public_set(name: str, root: Path) -> tuple[tuple[str, ...], Splits, str]:
    """Return class names, splits and the split's origin: `zhou`, `official` or `own`."""
    source = PUBLIC_SETS[name]
    folder = root / source.coop_folder
    if source.split_file and (folder / source.split_file).is_file():
        return *read_split_file(folder / source.split_file, folder / source.images), "zhou"
    if source.torchvision is None:
        raise DataError(
            f"{name} cannot be downloaded; expected {folder / str(source.split_file)} and images "
            f"in {folder / source.images}"
        )
    loaded = _torchvision(name, source, root)
    if source.tree:
        tree = {k: v for k, v in class_files(root / source.tree).items() if k not in DROPPED}
        return _names(sorted(tree)), split_tree(tree, root / source.tree), "own"
    classes = _names(loaded[0].classes)
    parts = [_items(part) for part in loaded]
    if source.pooled:
        tree = {
            f"{label:04d}": [item.source for item in group]  # type: ignore[misc]
            for label, group in by_class([item for part in parts for item in part]).items()
        }
        return classes, split_tree(tree, root), "own"
    if len(parts) == 2:
        train, val = _with_validation(parts[0])
        return classes, {"train": train, "val": val, "test": parts[1]}, "own"
    return classes, dict(zip(("train", "val", "test"), parts, strict=True)), "official"


def read_split_file(file: Path, images: Path) -> tuple[tuple[str, ...], Splits]:
    """Read CoOp's `{"train": [[path, label, name], ...], "val": ..., "test": ...}`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {
            split: [Item(images / path, int(label)) for path, label, _ in content[split]]
            for split in ("train", "val", "test")
        }
        names = {int(label): name for split in splits for _, label, name in content[split]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{file} is not a CoOp split file: {error!r}") from error
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{file} has labels {sorted(names)[:5]}..., expected 0, 1, 2, ...")
    return tuple(names[label].replace("_", " ") for label in sorted(names)), splits


def _torchvision(name: str, source: PublicSet, root: Path) -> list[Any]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(f"{name} needs torchvision: pip install torchvision") from error
    cls = getattr(datasets, str(source.torchvision))
    arguments = [{"split": part} for part in source.parts] or [{}]
    try:
        return [cls(root, **kwargs, download=False) for kwargs in arguments]
    except (RuntimeError, OSError):
        pass
    before = set(root.iterdir()) if root.is_dir() else None
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            return [cls(root, **kwargs, download=True) for kwargs in arguments]
    except (RuntimeError, OSError) as error:
        _remove_empty(root, before)
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise DataError(
            f"cannot download {name} to {root} ({reason}); put the images there yourself (CoOp's "
            f"layout {source.coop_folder}/{source.images}) or use --dataset folder:PATH or digits"
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _remove_empty(root: Path, before: set[Path] | None) -> None:
    """Take back the empty folders that a failed download made."""
    if not root.is_dir():
        return
    made = set(root.iterdir()) - (before or set())
    for folder in sorted(
        {path for top in made for path in [top, *top.rglob("*")] if path.is_dir()}, reverse=True
    ):
        if not any(folder.iterdir()):
            folder.rmdir()
    if before is None and not any(root.iterdir()):
        root.rmdir()


def _items(part: Any) -> list[Item]:
    """Read torchvision's index; its attribute names differ between classes."""
    files = getattr(part, "_image_files", None) or part._images
    pairs = sorted(zip(map(Path, files), part._labels, strict=True))
    return [Item(file, int(label)) for file, label in pairs]


def _with_validation(items: list[Item]) -> tuple[list[Item], list[Item]]:
    rng = random.Random(SPLIT_SEED)
    train: list[Item] = []
    val: list[Item] = []
    for group in by_class(items).values():
        chosen = set(rng.sample(range(len(group)), round(len(group) * VALIDATION_SHARE)))
        for index, item in enumerate(group):
            (val if index in chosen else train).append(item)
    return train, val


def _names(folders: list[str]) -> tuple[str, ...]:
    return tuple(RENAMED.get(name, name).replace("_", " ").replace("/", " ") for name in folders)
