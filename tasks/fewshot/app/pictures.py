"""Pictures per class, from uploaded files or a zip of class folders; nothing is trusted.

A zip file is never unpacked by its own names: every picture gets a numbered folder, and of its
name only letters, digits, dots and dashes are kept, so that no name can lead elsewhere. Sizes are
limited before anything is written.
"""

import hashlib
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from tasks.fewshot.folder import IMAGE_SUFFIXES, SPLIT_NAMES
from tasks.fewshot.images import UnreadableImage, decode_all, open_image
from tasks.fewshot.sampling import Item
from visionlora.errors import DataError

MAX_PICTURES = 5000
MAX_PICTURE_BYTES = 64 << 20
MAX_TOTAL_BYTES = 2 << 30
MAX_MEMBERS = 20_000
"""Entries of a zip file, folders and other files included."""
MAX_NAME = 60
CHUNK = 1 << 20

Tree = dict[str, list[Path]]

WANTED = "put the pictures of every class into a folder named like the class, and zip these folders"


@dataclass(frozen=True)
class Pictures:
    """Readable pictures per class, in the order of the classes, and what was left out."""

    classes: Tree
    unreadable: list[str] = field(default_factory=list)
    doubles: int = 0

    @property
    def count(self) -> int:
        """Number of pictures."""
        return sum(len(files) for files in self.classes.values())


def from_rows(rows: Sequence[tuple[str, Sequence[Path]]]) -> Tree:
    """Return the pictures of rows of a class name and its files; empty rows count for nothing.

    Raises:
        DataError: a name without pictures, pictures without a name, or a name twice.
    """
    tree: Tree = {}
    for number, (text, files) in enumerate(rows, 1):
        name = " ".join(text.split())
        if not name and not files:
            continue
        if not name:
            raise DataError(f"class {number} has {len(files)} pictures but no name")
        if not files:
            raise DataError(f"class {name!r} has no pictures")
        if name.casefold() in (other.casefold() for other in tree):
            raise DataError(f"two classes are both called {name!r}")
        tree[name] = list(files)
    return tree


def from_zip(file: Path, folder: Path) -> Tree:
    """Write the pictures of a zip file of class folders below `folder`; return them by class.

    Raises:
        DataError: no zip file, no class folders, a name that leads outside, or too much in it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(archive)
            tree: Tree = {}
            for number, (name, member) in enumerate(members):
                plain = re.sub(r"[^\w.-]", "_", PurePosixPath(member.filename).name)
                target = folder / f"{number:05d}" / plain[-MAX_NAME:]
                _write(archive, member, target)
                tree.setdefault(name, []).append(target)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise DataError(f"the zip file cannot be read: {error}") from error
    return from_rows(list(tree.items()))


def readable(tree: Mapping[str, Sequence[Path]]) -> Pictures:
    """Leave out pictures that cannot be decoded, and second copies of the same file.

    Raises:
        DataError: too few classes, too many pictures, a class without a readable picture, or the
            same picture in two classes.
    """
    if len(tree) < 2:
        raise DataError(f"at least two classes with pictures are needed, there are {len(tree)}")
    if long := [name for name in tree if len(name) > MAX_NAME]:
        raise DataError(f"class names have at most {MAX_NAME} characters, got {long[0][:MAX_NAME]}")
    if (count := sum(len(files) for files in tree.values())) > MAX_PICTURES:
        raise DataError(f"{count} pictures are too many: at most {MAX_PICTURES}")
    classes: Tree = {}
    unreadable: list[str] = []
    seen: dict[bytes, str] = {}
    for name, files in tree.items():
        classes[name] = []
        for item, found, reason in decode_all([Item(file, 0) for file in files], _decoded):
            path = Path(str(item.source))
            if found is None:
                reason = reason.removeprefix(f"{path}: ").replace(f" {str(path)!r}", "")
                unreadable.append(f"{path.name}: {reason}")
                continue
            content = hashlib.sha256(path.read_bytes()).digest()
            if seen.get(content, name) != name:
                raise DataError(f"{path.name} is both in {seen[content]!r} and in {name!r}")
            if content not in seen:
                classes[name].append(path)
            seen[content] = name
        if not classes[name]:
            raise DataError(f"class {name!r} has no readable picture")
    return Pictures(classes, unreadable, count - len(unreadable) - len(seen))


def _decoded(source: Any) -> Tensor:
    if Path(source).stat().st_size > MAX_PICTURE_BYTES:
        raise UnreadableImage(f"larger than {MAX_PICTURE_BYTES >> 20} MB")
    open_image(source)
    return torch.empty(0)


def _members(archive: zipfile.ZipFile) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return the pictures of an archive with their classes, after checking names and sizes."""
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise DataError(f"the zip file has {len(entries)} entries: at most {MAX_MEMBERS}")
    found: list[tuple[tuple[str, ...], zipfile.ZipInfo]] = []
    for entry in entries:
        parts = _parts(entry)
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        if (
            entry.is_dir()
            or hidden
            or PurePosixPath(parts[-1]).suffix.lower() not in IMAGE_SUFFIXES
        ):
            continue
        if entry.file_size > MAX_PICTURE_BYTES:
            limit = MAX_PICTURE_BYTES >> 20
            raise DataError(f"{parts[-1]} in the zip file is larger than {limit} MB")
        found.append((parts, entry))
    if sum(entry.file_size for _, entry in found) > MAX_TOTAL_BYTES:
        raise DataError(f"the zip file unpacks to more than {MAX_TOTAL_BYTES >> 30} GB")
    while found and len({parts[0] for parts, _ in found}) == 1:
        # One folder around everything, as file managers make it.
        found = [(parts[1:], entry) for parts, entry in found if len(parts) > 1]
    if not found or any(len(parts) == 1 for parts, _ in found):
        raise DataError(f"the zip file does not hold two folders of pictures: {WANTED}")
    names = {parts[0] for parts, _ in found}
    if names <= {name for group in SPLIT_NAMES.values() for name in group}:
        raise DataError(f"the zip file holds {' and '.join(sorted(names))} folders: {WANTED}")
    return [(parts[0], entry) for parts, entry in sorted(found, key=lambda pair: pair[0])]


def _parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    """Return the parts of a member's name, and refuse names that lead elsewhere."""
    name = entry.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    linked = stat.S_ISLNK(entry.external_attr >> 16)
    if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or linked:
        raise DataError(f"the zip file names a place outside of itself: {entry.filename!r}")
    return parts


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as stream:
        while chunk := source.read(CHUNK):
            stream.write(chunk)
