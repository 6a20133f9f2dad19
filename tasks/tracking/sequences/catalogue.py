"""Benchmarks and training sets by name.

`load_benchmark("lasot", root)` returns the test sequences, complete or not at all: the official
list says which there have to be. A folder that holds none of the official ones is taken as one's
own data in the layout of that benchmark, and all its sequences are read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tasks.tracking.sequences import folder, lasot
from tasks.tracking.sequences.found import Found, Selection, check_root, select
from tasks.tracking.sequences.sequence import Sequence, Track
from visionlora.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is found and read."""

    title: str
    layout: str
    find: Callable[[Path], Found]
    read: Callable[[str, Path], Sequence]
    names: Callable[[], tuple[str, ...]] = tuple
    """The official sequences; empty where the folder itself says which they are."""


@dataclass(frozen=True)
class TrainingSet:
    """How the tracks of one training set are found and read."""

    title: str
    layout: str
    find: Callable[[Path], Found]
    read: Callable[[str, Path], Track | None]


Entry = TypeVar("Entry", Benchmark, TrainingSet)

BENCHMARKS = {
    "lasot": Benchmark("LaSOT", lasot.LAYOUT, lasot.find, lasot.read, lasot.testing_set),
    "lasot_ext": Benchmark(
        "LaSOT_ext", lasot.LAYOUT, lasot.find, lasot.read_extension, lasot.extension_set
    ),
    "folder": Benchmark("own sequences", folder.LAYOUT, folder.find, folder.read),
}

TRAINING_SETS = {
    "lasot": TrainingSet("LaSOT", lasot.LAYOUT, lasot.find_training, lasot.read_training),
    "folder": TrainingSet("own sequences", folder.LAYOUT, folder.find, folder.read_training),
}


def find_sequences(
    benchmark: str,
    root: str | Path,
    sequences: Iterable[str] | None = None,
    skip_missing: bool = False,
) -> Selection:
    """Return which sequences of a benchmark are below `root`, and which are missing.

    Raises:
        ConfigError: there is no such benchmark.
        DataError: nothing is there, or something is missing and `skip_missing` is off.
    """
    entry = _entry(benchmark, BENCHMARKS, "benchmark")
    path = check_root(root, entry.title, entry.layout)
    found = entry.find(path)
    if not found:
        raise DataError(f"{entry.title}: no sequences in {path}; expected {entry.layout}")
    official = entry.names()
    wanted = sequences if sequences is not None else official
    if sequences is None and not any(name in found for name in official):
        wanted = found
    return select(entry.title, path, found, wanted, skip_missing)


def load_benchmark(
    name: str,
    root: str | Path,
    sequences: Iterable[str] | None = None,
    skip_missing: bool = False,
) -> list[Sequence]:
    """Return the sequences of a benchmark; `find_sequences` says which are missing.

    A sequence that is there but incomplete is an error in any case.

    Raises:
        ConfigError: there is no such benchmark.
        DataError: sequences, annotations or frames are missing, or do not fit together.
    """
    selection = find_sequences(name, root, sequences, skip_missing)
    read = BENCHMARKS[name].read
    return [read(sequence, path) for sequence, path in selection.present.items()]


def load_training(
    name: str, root: str | Path, sequences: Iterable[str] | None = None
) -> list[Track]:
    """Return the cleaned tracks of a training set; those without any box are left out.

    Raises:
        ConfigError: there is no such training set.
        DataError: nothing is there, or an annotation cannot be read.
    """
    entry = _entry(name, TRAINING_SETS, "training set")
    path = check_root(root, entry.title, entry.layout)
    found = entry.find(path)
    if sequences is not None:
        found = select(entry.title, path, found, sequences, skip_missing=False).present
    tracks = [track for item in found.items() if (track := entry.read(*item)) is not None]
    if not tracks:
        raise DataError(f"{entry.title}: nothing to train on in {path}; expected {entry.layout}")
    return tracks


def _entry(name: str, entries: dict[str, Entry], kind: str) -> Entry:
    if name not in entries:
        raise ConfigError(
            f"unknown {kind} {name!r}{nearest(name, entries)}; allowed: {', '.join(entries)}"
        )
    return entries[name]
