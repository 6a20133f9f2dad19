"""One table of the public data sets: folders, split files, prompt templates, downloads.

Images are looked for in three layouts, in this order: CoOp's folder, CLIP-LoRA's, torchvision's.
The template of each set is CoOp's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.fewshot.coop import indices
from tasks.fewshot.coop.indices import Index

PLAIN = "a photo of a {}."


@dataclass(frozen=True)
class Layout:
    """A folder below the root, and the folder of images below it."""

    folder: str
    images: str

    def home(self, root: Path) -> Path:
        """Return the folder that holds lists and split files."""
        return root / self.folder

    def pictures(self, root: Path) -> Path:
        """Return the folder that paths in a split file are relative to."""
        return root / self.folder / self.images


@dataclass(frozen=True)
class PublicSet:
    """Where a public data set lies and how its classes are asked for."""

    template: str
    layouts: tuple[Layout, ...]
    split_name: str | None = None
    """The sets that CoOp divides: `X` of `split_zhou_X.json`."""
    index: Callable[[Path, Path], Index] | None = None
    """Lists all images where the split file is missing, for an own split."""
    torchvision: str | None = None
    """Name of the torchvision class that downloads it."""
    targets_only: bool = False
    """All images are test images."""

    @property
    def split_file(self) -> str:
        """The published split."""
        return f"split_zhou_{self.split_name}.json"

    @property
    def own_file(self) -> str:
        """The split made here."""
        return f"split_visionlora_{self.split_name}.json"


def _layouts(*pairs: tuple[str, str]) -> tuple[Layout, ...]:
    return tuple(Layout(folder, images) for folder, images in pairs)


PUBLIC_SETS: dict[str, PublicSet] = {
    "imagenet": PublicSet(
        PLAIN,
        _layouts(("imagenet", "images"), ("imagenet", ".")),
    ),
    "caltech101": PublicSet(
        PLAIN,
        _layouts(
            ("caltech-101", "101_ObjectCategories"),
            ("Caltech101", "101_ObjectCategories"),
            ("caltech101", "101_ObjectCategories"),
        ),
        "Caltech101",
        indices.caltech,
        "Caltech101",
    ),
    "pets": PublicSet(
        "a photo of a {}, a type of pet.",
        _layouts(
            ("oxford_pets", "images"), ("OxfordPets", "images"), ("oxford-iiit-pet", "images")
        ),
        "OxfordPets",
        indices.pets,
        "OxfordIIITPet",
    ),
    "cars": PublicSet(
        PLAIN,
        _layouts(("stanford_cars", "."), ("StanfordCars", ".")),
        "StanfordCars",
        indices.cars,
    ),
    "flowers102": PublicSet(
        "a photo of a {}, a type of flower.",
        _layouts(("oxford_flowers", "jpg"), ("Flower102", "jpg"), ("flowers-102", "jpg")),
        "OxfordFlowers",
        indices.flowers,
        "Flowers102",
    ),
    "food101": PublicSet(
        "a photo of {}, a type of food.",
        _layouts(("food-101", "images"), ("Food101", "images")),
        "Food101",
        indices.folders,
        "Food101",
    ),
    "aircraft": PublicSet(
        "a photo of a {}, a type of aircraft.",
        _layouts(("fgvc_aircraft", "images"), ("fgvc-aircraft-2013b/data", "images")),
        torchvision="FGVCAircraft",
    ),
    "sun397": PublicSet(
        PLAIN,
        _layouts(("sun397", "SUN397"), ("SUN397", "SUN397"), ("SUN397", ".")),
        "SUN397",
        indices.sun,
        "SUN397",
    ),
    "dtd": PublicSet(
        "{} texture.",
        _layouts(("dtd", "images"), ("DTD", "images"), ("dtd/dtd", "images")),
        "DescribableTextures",
        indices.folders,
        "DTD",
    ),
    "eurosat": PublicSet(
        "a centered satellite photo of {}.",
        _layouts(("eurosat", "2750"), ("EuroSAT", "2750")),
        "EuroSAT",
        indices.eurosat,
        "EuroSAT",
    ),
    "ucf101": PublicSet(
        "a photo of a person doing {}.",
        _layouts(("ucf101", "UCF-101-midframes"), ("UCF101", "UCF-101-midframes")),
        "UCF101",
        indices.ucf,
    ),
    "imagenetv2": PublicSet(
        PLAIN,
        _layouts(("imagenetv2", "imagenetv2-matched-frequency-format-val")),
        targets_only=True,
    ),
    "imagenet-sketch": PublicSet(PLAIN, _layouts(("imagenet-sketch", "images")), targets_only=True),
    "imagenet-a": PublicSet(
        PLAIN, _layouts(("imagenet-adversarial", "imagenet-a")), targets_only=True
    ),
    "imagenet-r": PublicSet(
        PLAIN, _layouts(("imagenet-rendition", "imagenet-r")), targets_only=True
    ),
}

ELEVEN = tuple(name for name, source in PUBLIC_SETS.items() if not source.targets_only)
"""The benchmark of the field; ImageNet first."""
TRANSFER = ELEVEN[1:]
"""Targets of cross-data-set transfer from ImageNet."""
SHIFTED = tuple(name for name, source in PUBLIC_SETS.items() if source.targets_only)
"""Targets of domain generalisation from ImageNet."""
