"""Command `check`: what is found in a folder, before anything is trained on it.

Sizes are read from the header of every file; a few pairs are decoded, and the PSNR of the degraded
half says whether both belong together and how much there is to gain. Everything that would stop a
training is listed, not only the first of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tasks.restoration.images import Picture, header_size, pictures_below
from tasks.restoration.metrics import psnr
from tasks.restoration.pairs.layouts import AUTO, PairPath, look
from tasks.restoration.pairs.sources import PAIRS, check_size, read_pair, split_spec
from visionlora.errors import ConfigError, DataError

Item = TypeVar("Item")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
LISTED = 20
"""Things that are wrong, as far as they are listed."""
SHOWN = 4
"""Different sizes, folders and kinds that are shown."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Settings of a check."""

    data: str
    """Folder of pairs, or prod:FOLDER for clean pictures."""
    layout: str = AUTO
    """How pairs are laid out; a wrong name lists the known ones."""
    few: int = 8
    """Pairs that are decoded, evenly over all of them; 0 for all."""


def run(config: CheckConfig) -> dict[str, Any]:
    """Print what is in a folder, and return it.

    Raises:
        ConfigError: an unknown layout or kind of data.
        DataError: something there cannot be used; it has been printed.
    """
    if config.few < 0:
        raise ConfigError(f"--few must not be negative, got {config.few}")
    kind, path = split_spec(config.data)
    problems: list[str] = []
    if kind == PAIRS:
        found = _pairs(Path(path).expanduser(), config, problems)
    else:
        files = pictures_below(path)
        sizes = [size for size in (_try(header_size, problems, file) for file in files) if size]
        found = {"pictures": len(files), "sizes": _sizes(sizes)}
    for name, value in found.items():
        print(f"{name:<11} {_line(value)}")
    for problem in problems[:LISTED]:
        print(f"wrong: {problem}")
    if problems:
        more = f", of which {LISTED} are listed" if len(problems) > LISTED else ""
        raise DataError(f"{path}: {len(problems)} things cannot be used{more}")
    return found


def _pairs(root: Path, config: CheckConfig, problems: list[str]) -> dict[str, Any]:
    """Return what a folder of pairs holds; add what is wrong with it to `problems`."""
    there = look(root, config.layout)
    problems += [f"no other half for {path.relative_to(root)}" for path in there.alone]
    sound = [(pair, size) for pair in there.pairs if (size := _try(_pair_size, problems, pair))]
    kinds: Counter[str] = Counter()
    ratios: list[float] = []
    for pair, (height, width) in _spread(sound, config.few):
        halves = _try(read_pair, problems, pair)
        if halves is not None:
            kinds.update(map(_kind, halves))
            ratios.append(psnr(halves[0].in_8_bits, halves[1].in_8_bits))
            print(f"  {pair.name}: {width} x {height}, {ratios[-1]:.3f} dB")
    equal = sum(map(math.isinf, ratios))
    if equal:
        print(f"note: {equal} of these pairs are one picture twice; their ratio is left out")
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    return {
        "layout": there.layout,
        "pairs": len(there.pairs),
        "folders": dict(Counter(str(p.input.parent.relative_to(root)) for p in there.pairs)),
        "sizes": _sizes([size for _, size in sound]),
        "elsewhere": len(there.other),
        "decoded": len(ratios),
        "kinds": dict(kinds),
        "psnr_input": float(np.mean(finite)) if finite else None,
    }


def _try(read: Callable[[Asked], Answer], problems: list[str], what: Asked) -> Answer | None:
    """Read something, or say why not."""
    try:
        return read(what)
    except DataError as error:
        problems.append(str(error))
        return None


def _pair_size(pair: PairPath) -> tuple[int, int]:
    """Return the size that both halves have, by their headers."""
    size = header_size(pair.input)
    check_size(pair, size, header_size(pair.target))
    return size


def _spread(items: Sequence[Item], few: int) -> Sequence[Item]:
    """Return `few` of the items, first and last among them; all for 0."""
    if not 0 < few < len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, few).round().astype(int)]


def _kind(picture: Picture) -> str:
    bits = 8 * picture.levels.dtype.itemsize
    channels = "grey" if picture.grey else "RGB" if picture.alpha is None else "RGBA"
    return f"{channels}, {bits} bits"


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, int]:
    return dict(Counter(f"{width} x {height}" for height, width in sizes))


def _line(value: object) -> str:
    """Return a value as it is printed: counts with the most frequent first."""
    if isinstance(value, float):
        return f"{value:.3f} dB"
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    most = sorted(value.items(), key=lambda item: -item[1])
    more = f" and {len(most) - SHOWN} others" if len(most) > SHOWN else ""
    return "; ".join(f"{name} ({count})" for name, count in most[:SHOWN]) + more
