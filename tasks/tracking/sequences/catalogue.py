"""Benchmarks and training sets by name.

`load_benchmark("lasot", root)` returns the test sequences, complete or not at all: the official
list says which there have to be. A folder that holds none of the official ones is taken as one's
own data in the layout of that benchmark, and all its sequences are read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tasks.tracking.sequences import (
    coco,
    folder,
    got10k,
    lasot,
    nfs,
    otb,
    tnl2k,
    trackingnet,
    uav123,
)
from tasks.tracking.sequences.found import Found, Selection, check_root, select
from tasks.tracking.sequences.sequence import Sequence, Track
from visionlora.errors import ConfigError, DataError, nearest

Find = Callable[[Path], Found]


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is found and read."""

    title: str
    layout: str
    find: Find
    read: Callable[[str, Path], Sequence]
    names: Callable[[Path], tuple[str, ...]] = lambda _: ()
    """The official sequences; empty where the folder itself says which they are."""


@dataclass(frozen=True)
class TrainingSet:
    """How the tracks of one training set are read; those without any box are left out."""

    title: str
    layout: str
    read: Callable[[Path], Iterator[Track]]


Entry = TypeVar("Entry", Benchmark, TrainingSet)

LASOT = ("LaSOT", lasot.LAYOUT)
OWN = ("own sequences", folder.LAYOUT)

BENCHMARKS = {
    "lasot": Benchmark(*LASOT, lasot.find, lasot.read, lambda _: lasot.testing_set()),
    "lasot_ext": Benchmark(
        "LaSOT_ext", lasot.LAYOUT, lasot.find, lasot.read_extension, lambda _: lasot.extension_set()
    ),
    "got10k": Benchmark(
        "GOT-10k test",
        got10k.layout("test"),
        partial(got10k.find, split="test"),
        got10k.read_test,
        partial(got10k.names, split="test"),
    ),
    "got10k_val": Benchmark(
        "GOT-10k val",
        got10k.layout("val"),
        partial(got10k.find, split="val"),
        got10k.read_validation,
        partial(got10k.names, split="val"),
    ),
    "trackingnet": Benchmark("TrackingNet", trackingnet.LAYOUT, trackingnet.find, trackingnet.read),
    "tnl2k": Benchmark("TNL2K", tnl2k.LAYOUT, tnl2k.find, tnl2k.read),
    "uav123": Benchmark(
        "UAV123", uav123.LAYOUT.format("UAV123"), uav123.find, uav123.read, lambda _: uav123.names()
    ),
    "uav20l": Benchmark(
        "UAV20L", uav123.LAYOUT.format("UAV20L"), uav123.find_long, uav123.read_long
    ),
    "otb": Benchmark("OTB-100", otb.LAYOUT, otb.find, otb.read, lambda _: otb.names()),
    "nfs": Benchmark("NFS", nfs.LAYOUT, nfs.find, nfs.read, lambda _: nfs.names()),
    "folder": Benchmark(*OWN, folder.find, folder.read),
}


def _videos(find: Find, read: Callable[[str, Path], Track | None]) -> Callable[..., Iterator]:
    def tracks(root: Path) -> Iterator[Track]:
        return (track for item in find(root).items() if (track := read(*item)) is not None)

    return tracks


TRAINING_SETS = {
    "lasot": TrainingSet(*LASOT, _videos(lasot.find_training, lasot.read_training)),
    "got10k": TrainingSet(
        "GOT-10k train", got10k.layout("train"), _videos(got10k.find_training, got10k.read_training)
    ),
    "got10k_vot": TrainingSet(
        "GOT-10k train", got10k.layout("train"), _videos(got10k.find_vot_safe, got10k.read_training)
    ),
    "trackingnet": TrainingSet(
        "TrackingNet",
        trackingnet.TRAINING_LAYOUT,
        _videos(trackingnet.find_training, trackingnet.read_training),
    ),
    "coco": TrainingSet("COCO", coco.LAYOUT, coco.read_training),
    "folder": TrainingSet(*OWN, _videos(folder.find, folder.read_training)),
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
    try:
        found = entry.find(path)
    except OSError as error:
        raise DataError(f"{entry.title}: cannot read {error.filename}: {error.strerror}") from error
    if not found:
        raise DataError(f"{entry.title}: no sequences in {path}; expected {entry.layout}")
    official = entry.names(path)
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


def load_training(name: str, root: str | Path) -> list[Track]:
    """Return the cleaned tracks of a training set; those without any box are left out.

    Frames are looked up when they are read: there are 14 million in TrackingNet.

    Raises:
        ConfigError: there is no such training set.
        DataError: nothing is there, or an annotation cannot be read.
    """
    entry = _entry(name, TRAINING_SETS, "training set")
    path = check_root(root, entry.title, entry.layout)
    tracks = list(entry.read(path))
    if not tracks:
        raise DataError(f"{entry.title}: nothing to train on in {path}; expected {entry.layout}")
    return tracks


def _entry(name: str, entries: dict[str, Entry], kind: str) -> Entry:
    if name not in entries:
        raise ConfigError(
            f"unknown {kind} {name!r}{nearest(name, entries)}; allowed: {', '.join(entries)}"
        )
    return entries[name]
