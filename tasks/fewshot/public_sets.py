"""The public few-shot benchmarks: whose layout, whose split, and what to say if one is missing.

With CoOp's `split_zhou_*.json` its split is used, so that shots equal the published ones; CoOp's
pickled shots are never read, they are drawn again. Without that file the data set is refused, or
divided here if `--own-split` asks for it, and then called an own split wherever figures appear.
"""

from pathlib import Path

from tasks.fewshot.coop.download import download
from tasks.fewshot.coop.listed import read_aircraft, read_imagenet, read_shifted
from tasks.fewshot.coop.splits import divide, read_split_file, write_split_file
from tasks.fewshot.coop.table import PUBLIC_SETS, Layout, PublicSet
from tasks.fewshot.folder import Splits
from visionlora.errors import DataError, VisionLoraError

__all__ = ["PUBLIC_SETS", "read_public_set"]


def read_public_set(
    name: str, root: Path, own_split: bool = False
) -> tuple[tuple[str, ...], Splits, str]:
    """Return class names, splits and the split's origin: `zhou`, `official` or `own`.

    Raises:
        DataError: missing images, lists or split file, or ones that contradict each other.
    """
    source = PUBLIC_SETS[name]
    published = _find(source, root, source.split_file) if source.split_name else None
    if source.split_name and published is None and not own_split:
        raise DataError(_without_split(name, source, root))
    layout = _layout(name, source, root)
    home, images = layout.home(root), layout.pictures(root)
    if published is not None:
        return *read_split_file(published, images), "zhou"
    if source.split_name:
        return *_own_split(name, source, root, home, images), "own"
    if name == "imagenet":
        return *read_imagenet(home, images), "official"
    if name == "aircraft":
        return *read_aircraft(home, images), "official"
    return *read_shifted(home, images, numbered=name == "imagenetv2"), "official"


def _own_split(
    name: str, source: PublicSet, root: Path, home: Path, images: Path
) -> tuple[tuple[str, ...], Splits]:
    """Read the split that was made here before, or make it."""
    file = _find(source, root, source.own_file)
    if file is not None:
        return read_split_file(file, images)
    assert source.index is not None
    try:
        index = source.index(home, images)
    except VisionLoraError:
        raise
    except (OSError, KeyError, ValueError, IndexError) as error:
        missing = getattr(error, "filename", None)
        reason = f"{missing} is missing" if missing else f"its lists cannot be read ({error!r})"
        raise DataError(
            f"no own split of {name}: {reason}; {source.split_file} is not there either"
        ) from error
    splits = divide(index, images)
    write_split_file(home / source.own_file, index.names, splits, images)
    return tuple(label.replace("_", " ") for label in index.names), splits


def _layout(name: str, source: PublicSet, root: Path) -> Layout:
    """Return the first layout whose images are there, after a download if need be."""
    for layout in source.layouts:
        if _has_images(layout, root):
            return layout
    if source.torchvision is None:
        places = ", ".join(str(layout.pictures(root)) for layout in source.layouts)
        raise DataError(
            f"{name} cannot be downloaded and is not there; expected images in {places}"
        )
    download(name, source.torchvision, root, source.layouts[0].pictures(root))
    return next(
        (layout for layout in source.layouts if _has_images(layout, root)), source.layouts[-1]
    )


def _has_images(layout: Layout, root: Path) -> bool:
    """Tell whether the folder of images is there; one that is the home itself has sub-folders."""
    pictures = layout.pictures(root)
    if layout.images != ".":
        return pictures.is_dir()
    return pictures.is_dir() and any(entry.is_dir() for entry in pictures.iterdir())


def _find(source: PublicSet, root: Path, file: str) -> Path | None:
    """Look for a split file in the folders of all layouts, and in the root."""
    places = [*(layout.home(root) for layout in source.layouts), root]
    return next((place / file for place in places if (place / file).is_file()), None)


def _without_split(name: str, source: PublicSet, root: Path) -> str:
    layout = source.layouts[0]
    return (
        f"{name} needs CoOp's split file {layout.home(root) / source.split_file} (images in "
        f"{layout.pictures(root)}); without it --own-split divides the images by the same rule, "
        "which gives figures that are not comparable with published ones"
    )
