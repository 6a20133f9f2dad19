"""Which sequences a folder holds, and what is said when one of them is not there."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from visionlora.errors import ConfigError, DataError, nearest

SHOWN = 3
"""Names that an error message lists."""

Found = dict[str, Path]
"""Name of a sequence -> its folder, or its annotation file where these lie together."""


@dataclass(frozen=True)
class Selection:
    """The sequences that were asked for: those that are there, and the names of the others."""

    present: Found
    missing: tuple[str, ...]


@cache
def shipped(name: str) -> tuple[str, ...]:
    """Return the lines of one of the package's own lists."""
    text = (files("tasks.tracking.sequences") / "lists" / name).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


@cache
def shipped_attributes(name: str) -> dict[str, tuple[str, ...]]:
    """Return name -> attributes from a list with `name ATTRIBUTE ATTRIBUTE ...` on each line."""
    return {(words := line.split())[0]: tuple(words[1:]) for line in shipped(name)}


def check_root(root: str | Path, title: str, layout: str) -> Path:
    """Return the folder `root`.

    Raises:
        DataError: it is not there; the line names the layout that was expected.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    what = "is not a folder" if path.exists() else "does not exist"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"{title}: {path} {what}{nearest(path.name, names)}; expected {layout}")


def folders(root: Path) -> list[Path]:
    """Return the sub-folders of `root` in the order of their names, hidden ones left out."""
    entries = (entry for entry in root.iterdir() if not entry.name.startswith((".", "__")))
    return sorted(entry for entry in entries if entry.is_dir())


def with_any(root: Path, markers: Iterable[str]) -> Found:
    """Return the folders that hold one of `markers`: `root/<seq>`, `root/<class>/<seq>`, or `root`.

    Raises:
        DataError: two sequences have the same name.
    """
    marks = tuple(markers)

    def holds(folder: Path) -> bool:
        return any((folder / mark).exists() for mark in marks)

    if holds(root):
        return {root.resolve().name: root}
    found: Found = {}
    for folder in folders(root):
        for sequence in [folder] if holds(folder) else filter(holds, folders(folder)):
            if other := found.get(sequence.name):
                raise DataError(f"two sequences are called {sequence.name!r}: {other}, {sequence}")
            found[sequence.name] = sequence
    return found


def select(
    title: str, root: Path, found: Found, wanted: Iterable[str], skip_missing: bool
) -> Selection:
    """Return which of the sequences `wanted` are there.

    Raises:
        DataError: some are not, and `skip_missing` is off; or none is.
    """
    names = tuple(dict.fromkeys(wanted))
    if not names:
        raise DataError(f"{title}: no sequences were asked for; {root} holds {len(found)}")
    missing = tuple(name for name in names if name not in found)
    if missing and (not skip_missing or len(missing) == len(names)):
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        advice = "" if len(missing) == len(names) else "; --skip-missing takes those that are there"
        raise DataError(
            f"{title}: sequence {missing[0]!r}{nearest(missing[0], found)}{rest} of {len(names)} "
            f"not found in {root}, which holds {len(found)}{advice}"
        )
    return Selection({name: found[name] for name in names if name in found}, missing)


def chosen(words: Iterable[str] | None) -> list[str] | None:
    """Return the names in the words of `--sequences`, which may have commas between them.

    Raises:
        ConfigError: there is none; None stands for all sequences.
    """
    if words is None:
        return None
    names = [name for word in words for name in word.replace(",", " ").split()]
    if not names:
        raise ConfigError("--sequences names no sequence")
    return names


def few(names: list[str]) -> str:
    """Return the first names of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
