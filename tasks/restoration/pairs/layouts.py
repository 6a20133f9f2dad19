"""Pairs of pictures on disk, in the layouts that users have.

folders   two folders side by side, `input` and `target` or another of the names below, anywhere
          below the root (LOL: our485/low and our485/high; GoPro: <sequence>/blur and .../sharp)
names     both in one folder, told apart by a part of the name (SIDD: *_NOISY_* and *_GT_*;
          PolyU: *_real and *_mean)

Files belong together whose names without suffix are equal, or become equal without the words that
say which side they are (Rain100: rain-001 and norain-001), or where the clean one is the part of
the other before the first `_` (RESIDE: 0001_0.8_0.2 and 0001). Nothing is guessed beyond that: a
picture without its other half is an error that names it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.restoration.images import pictures_below
from visionlora.errors import ConfigError, DataError, nearest

AUTO = "auto"
FOLDERS: dict[str, tuple[str, str]] = {
    "input-target": ("input", "target"),
    "lq-gt": ("lq", "gt"),
    "rain-norain": ("rain", "norain"),
    "low-high": ("low", "high"),
    "blur-sharp": ("blur", "sharp"),
    "hazy-clear": ("hazy", "clear"),
    "noisy-clean": ("noisy", "clean"),
}
NAMES: dict[str, tuple[str, str]] = {"sidd": ("NOISY", "GT"), "polyu": ("real", "mean")}
LAYOUTS = (AUTO, *FOLDERS, *NAMES)
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


def find_pairs(root: str | Path, layout: str = AUTO) -> Found:
    """Return the pairs below a folder in the order of their names.

    Args:
        root: folder of the pairs.
        layout: one of `LAYOUTS`; `auto` takes the first that is there.

    Raises:
        ConfigError: an unknown layout.
        DataError: no pair, or pictures without their other half.
    """
    if layout not in LAYOUTS:
        raise ConfigError(
            f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}"
        )
    folder = Path(root).expanduser()
    files = pictures_below(folder)
    for name in LAYOUTS[1:] if layout == AUTO else (layout,):
        sides = _by_folder(files, *FOLDERS[name]) if name in FOLDERS else _by_name(files, name)
        if sides is not None:
            return Found(name, _matched(folder, *sides, words=FOLDERS.get(name) or NAMES[name]))
    wanted = "a known layout" if layout == AUTO else f"the layout {layout}"
    raise DataError(
        f"{folder} has no pairs in {wanted}: two folders input/ and target/ are enough (or "
        + ", ".join(f"{one}/ {other}/" for one, other in list(FOLDERS.values())[1:])
        + ")"
    )


Sides = tuple[list[Path], list[Path]]


def _by_folder(files: Sequence[Path], one: str, other: str) -> Sides | None:
    """Split files by a folder they are in; None if one of the two is nowhere."""
    sides = tuple([path for path in files if _within(path, name)] for name in (one, other))
    return (sides[0], sides[1]) if all(sides) else None


def _within(path: Path, name: str) -> bool:
    return path.parent.name.lower() == name


def _by_name(files: Sequence[Path], layout: str) -> Sides | None:
    """Split files by a word in their name."""
    sides = tuple(
        [path for path in files if re.search(_word(word), path.stem)] for word in NAMES[layout]
    )
    return (sides[0], sides[1]) if all(sides) else None


def _word(word: str) -> str:
    return rf"(^|[_-]){word}(?=[_-]|\d|$)"


def _matched(
    root: Path, inputs: list[Path], targets: list[Path], words: tuple[str, str]
) -> tuple[PairPath, ...]:
    """Put both sides together.

    Raises:
        DataError: a picture without its other half, or with several.
    """
    by_key: dict[tuple[str, ...], Path] = {}
    for path in targets:
        key = _key(root, path, words)
        if key in by_key:
            raise DataError(f"{by_key[key]} and {path} are the clean half of the same picture")
        by_key[key] = path
    pairs, alone, used = [], [], set()
    for path in inputs:
        *folders, stem = _key(root, path, words)
        keys = [(*folders, stem), (*folders, stem.split("_")[0])]
        target = next((by_key[key] for key in keys if key in by_key), None)
        if target is None:
            alone.append(path)
            continue
        used.add(target)
        name = str(path.relative_to(root).with_suffix(""))
        pairs.append(PairPath(name, path, target))
    alone += [path for path in targets if path not in used]
    if alone:
        names = ", ".join(str(path.relative_to(root)) for path in alone[:SHOWN])
        more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
        raise DataError(f"{root}: no other half for {names}{more} ({len(pairs)} pairs are whole)")
    return tuple(sorted(pairs, key=lambda pair: pair.name))


def _key(root: Path, path: Path, words: tuple[str, str]) -> tuple[str, ...]:
    """Return the folders and the name of a picture, without the words that name its side."""
    folders = [part for part in path.relative_to(root).parent.parts if part.lower() not in words]
    stem = path.stem
    for word in words:
        stem = re.sub(_word(word), "", stem, count=1)
    return (*folders, stem.strip("_-"))
