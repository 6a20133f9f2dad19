"""Pairs of pictures on disk, in the layouts that users have.

folders   two folders side by side, `input` and `target` or another of the names below, anywhere
          below the root (GoPro: <sequence>/blur and <sequence>/sharp); folders inside them are fine
names     told apart by a word in the name (SIDD: *_NOISY_* and *_GT_* in a folder for each scene;
          PolyU: *_real and *_mean; Rain100: rain-001 and norain-001)

A degraded picture belongs to the clean one in the same place whose name without suffix is

    the same                                        1        and  1
    the same without words that name a side         rain-001 and  norain-001
    the part before the first `_`                   0001_0.8 and  0001          (RESIDE)

the first of these that is there. Nothing is guessed beyond that: a picture without its other half
is an error that names it. Parts that a data set keeps apart (LOL: our485 and eval15) are found
together below their common root; give the root of one part.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.restoration.images import pictures_below
from visionlora.errors import ConfigError, DataError, nearest

AUTO = "auto"
FOLDERS: dict[str, tuple[str, str]] = {
    "input-target": ("input", "target"),
    "lq-gt": ("lq", "gt"),
    "rain-norain": ("rain", "norain"),
    "rainy-gt": ("rainy", "gt"),
    "low-high": ("low", "high"),
    "blur-sharp": ("blur", "sharp"),
    "hazy-clear": ("hazy", "clear"),
    "hazy-gt": ("hazy", "gt"),
    "noisy-clean": ("noisy", "clean"),
}
NAMES: dict[str, tuple[str, str]] = {
    "sidd": ("noisy", "gt"),
    "polyu": ("real", "mean"),
    "rain100": ("rain", "norain"),
}
LAYOUTS = (AUTO, *FOLDERS, *NAMES)
WORDS = frozenset(word for both in (*FOLDERS.values(), *NAMES.values()) for word in both)
SHOWN = 3
"""How many names an error lists."""


@dataclass(frozen=True)
class PairPath:
    """Where the two halves of a pair are."""

    name: str
    """Path of the degraded half below the root, without suffix; unique."""
    input: Path
    target: Path


@dataclass(frozen=True)
class Found:
    """What was found below a root."""

    layout: str
    pairs: tuple[PairPath, ...]
    alone: tuple[Path, ...]
    """Pictures without their other half."""
    other: tuple[Path, ...]
    """Pictures that are on neither side."""


class Half(NamedTuple):
    """A picture, and what it has in common with its other half."""

    path: Path
    place: tuple[str, ...]
    """Folders from the root on, without the one that names the side."""


class Sides(NamedTuple):
    """All degraded and all clean pictures."""

    degraded: list[Half]
    clean: list[Half]


def find_pairs(root: str | Path, layout: str = AUTO) -> Found:
    """Return the pairs below a folder in the order of their names.

    Args:
        root: folder of the pairs.
        layout: one of `LAYOUTS`; `auto` takes the first that is there.

    Raises:
        ConfigError: an unknown layout.
        DataError: no pair, or pictures without their other half.
    """
    found = look(root, layout)
    if found.alone:
        names = ", ".join(str(path.relative_to(_folder(root))) for path in found.alone[:SHOWN])
        more = f" and {len(found.alone) - SHOWN} more" if len(found.alone) > SHOWN else ""
        whole = f"({len(found.pairs)} pairs are whole)"
        raise DataError(f"{root}: no other half for {names}{more} {whole}")
    return found


def look(root: str | Path, layout: str = AUTO) -> Found:
    """Return what is below a folder, pictures without their other half too.

    Raises:
        ConfigError: an unknown layout.
        DataError: the layout is not there, or two pictures are the same half of a pair.
    """
    if layout not in LAYOUTS:
        raise ConfigError(
            f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}"
        )
    folder = _folder(root)
    files = pictures_below(folder)
    for name in LAYOUTS[1:] if layout == AUTO else (layout,):
        split = _by_folder if name in FOLDERS else _by_name
        sides = split(folder, files, *(FOLDERS.get(name) or NAMES[name]))
        if all(sides):
            return _matched(folder, name, files, sides)
    wanted = "a known layout" if layout == AUTO else f"the layout {layout}"
    raise DataError(
        f"{folder} has no pairs in {wanted}: two folders input/ and target/ are enough (or "
        + ", ".join(f"{one}/ {other}/" for one, other in list(FOLDERS.values())[1:])
        + ")"
    )


def _folder(root: str | Path) -> Path:
    return Path(root).expanduser()


def _by_folder(root: Path, files: Iterable[Path], one: str, other: str) -> Sides:
    """Split files by the deepest of their folders that names a side."""
    sides = Sides([], [])
    for path in files:
        folders = path.relative_to(root).parent.parts
        depths = [i for i, folder in enumerate(folders) if folder.lower() in (one, other)]
        if depths:
            at = depths[-1]
            half = Half(path, (*folders[:at], *folders[at + 1 :]))
            (sides.degraded if folders[at].lower() == one else sides.clean).append(half)
    return sides


def _by_name(root: Path, files: Iterable[Path], one: str, other: str) -> Sides:
    """Split files by a word in their name."""
    sides = Sides([], [])
    for path in files:
        is_one, is_other = (bool(_naming(word).search(path.stem)) for word in (one, other))
        if is_one != is_other:
            folders = path.relative_to(root).parent.parts
            half = Half(path, tuple(part for part in folders if part.lower() not in WORDS))
            (sides.degraded if is_one else sides.clean).append(half)
    return sides


def _naming(*words: str) -> re.Pattern[str]:
    """Return where a name says its side: `rain-001`, `a_NOISY_b`, not `norain` or `reality`."""
    return re.compile(rf"(?:^|[_-])(?:{'|'.join(words)})(?=[_-]|\d|$)", re.IGNORECASE)


_SIDE = _naming(*sorted(WORDS))


def _plain(stem: str) -> str:
    """Return a name without the words that name a side."""
    return _SIDE.sub("", stem).strip("_-")


def _matched(root: Path, layout: str, files: list[Path], sides: Sides) -> Found:
    """Put both sides together."""
    exact: defaultdict[tuple[tuple[str, ...], str], list[Path]] = defaultdict(list)
    plain: defaultdict[tuple[tuple[str, ...], str], list[Path]] = defaultdict(list)
    for path, place in sides.clean:
        exact[place, path.stem].append(path)
        plain[place, _plain(path.stem)].append(path)
    pairs: dict[str, PairPath] = {}
    alone = []
    for path, place in sides.degraded:
        found = (
            exact.get((place, path.stem))
            or plain.get((place, _plain(path.stem)))
            or exact.get((place, path.stem.split("_")[0]))
        )
        if found is None:
            alone.append(path)
            continue
        if len(found) > 1:
            raise DataError(f"{found[0]} and {found[1]} are the clean half of the same picture")
        name = str(path.relative_to(root).with_suffix(""))
        if name in pairs:
            raise DataError(f"{pairs[name].input} and {path} are the same degraded picture")
        pairs[name] = PairPath(name, path, found[0])
    used = {pair.target for pair in pairs.values()}
    alone += [half.path for half in sides.clean if half.path not in used]
    known = {half.path for side in sides for half in side}
    return Found(
        layout,
        tuple(pairs[name] for name in sorted(pairs)),
        tuple(alone),
        tuple(path for path in files if path not in known),
    )
