"""The command `run`: restore a picture, or all pictures below a folder.

    IN/a/b.jpg  ->  OUT/a/b.png

Size, grey, transparency and 16 bits stay; photographs are written as their camera says they are to
be seen, other metadata is not kept. Pictures of any size are restored in tiles, row by row. A
picture that cannot be read is named, the others are restored, and the run ends with an error. A run
that was stopped goes on where it was: what is finished is not done again. The input is never
written to.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.restoration.degradations.chosen import named_pictures
from tasks.restoration.finished import Finished
from tasks.restoration.images import (
    SUFFIXES,
    check_format,
    header_size,
    read_picture,
    write_levels,
)
from tasks.restoration.inference.restorer import Restorer, RestorerConfig
from tasks.restoration.inference.tiling import OnTile
from tasks.restoration.orientation import upright
from visionlora.errors import DataError, OutputError
from visionlora.training import Progress

FORMATS = {"png": ".png", "tif": ".tif", "jpg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True, kw_only=True)
class RunConfig(RestorerConfig):
    """Restore a picture, or all pictures below a folder."""

    input: str
    """A picture, or a folder of pictures."""
    output: str
    """Folder of the restored pictures; for one picture also its file, as in restored.png."""
    format: Literal["png", "tif", "jpg", "webp", "same"] = "png"
    """How pictures are stored in a folder; same keeps the format of each."""
    overwrite: bool = False
    """Restore again what is there already."""


def run(config: RunConfig, restorer: Restorer | None = None) -> dict[str, Any]:
    """Restore pictures and return how many were restored and how many were there already.

    Args:
        config: the settings.
        restorer: the network itself, instead of the one that `config` names.

    Raises:
        VisionLoraError: nothing is there, the network cannot be used, or nothing can be written;
            or some pictures cannot be read, and the others are restored.
    """
    found = named_pictures(config.input)
    targets = _targets(config, found)
    restorer = restorer or Restorer(config)
    finished = _record(config, restorer)
    waiting = [
        name
        for name, target in targets.items()
        if config.overwrite or not _is_there(target, finished)
    ]
    if len(waiting) < len(found):
        print(
            f"{len(found) - len(waiting)} of {len(found)} pictures are restored already and are "
            "kept; --overwrite restores them again"
        )
    failures = _restore_all(restorer, {name: found[name] for name in waiting}, targets, finished)
    done = len(waiting) - len(failures)
    if failures:
        raise DataError(
            f"{len(failures)} of {len(found)} pictures cannot be restored ({failures[0]}); "
            f"the other {len(found) - len(failures)} are in {config.output}"
        )
    print(f"{done} pictures restored: {config.output}")
    return {"restored": done, "kept": len(found) - len(waiting)}


def _restore_all(
    restorer: Restorer,
    waiting: Mapping[str, Path],
    targets: Mapping[str, Path],
    finished: Finished | None,
) -> list[DataError]:
    """Restore pictures one after the other; return why some could not be."""
    failures: list[DataError] = []
    sizes = {name: _pixels(path) for name, path in waiting.items()}
    total, before = max(1, sum(sizes.values())), 0
    with Progress(100, "restore, percent") as progress:
        for number, (name, path) in enumerate(waiting.items(), 1):

            def told(tile: int, tiles: int, done: int = before, name: str = name) -> None:
                share = (done + sizes[name] * tile / tiles) / total
                progress.show(int(100 * share), f"{name}, tile {tile} of {tiles},")

            try:
                if finished is not None:
                    finished.begin(targets[name])
                _restore(restorer, path, targets[name], told)
                if finished is not None:
                    finished.end(targets[name])
            except DataError as error:
                failures.append(error)
                print(f"left out: {error}", file=sys.stderr, flush=True)
            before += sizes[name]
            progress.show(100 * before // total, f"{number} of {len(waiting)} pictures,")
    return failures


def _restore(restorer: Restorer, source: Path, target: Path, on_tile: OnTile) -> None:
    """Restore one picture.

    Raises:
        DataError: it cannot be read, restored, or stored in this format.
        OutputError: nothing can be written.
    """
    picture = upright(read_picture(source), source)
    try:
        check_format(target, picture)
    except OutputError as error:
        raise DataError(str(error)) from error
    write_levels(target, restorer(picture.levels, on_tile), picture)


def _targets(config: RunConfig, found: dict[str, Path]) -> dict[str, Path]:
    """Return where each picture is written.

    Raises:
        OutputError: into the input, or into a file that should be a folder.
        DataError: two pictures would be written to one file.
    """
    source, output = Path(config.input).expanduser(), Path(config.output).expanduser()
    if _is_file(config):
        targets = dict.fromkeys(found, output)
    else:
        if output.is_file():
            raise OutputError(f"{output} is a file; name a folder for the restored pictures")
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{output} is inside of the input; name a folder outside")
        suffix = FORMATS.get(config.format)
        targets = {
            name: output / (Path(name).with_suffix(suffix) if suffix else name) for name in found
        }
    owners: dict[Path, str] = {}
    inputs = {path.resolve() for path in found.values()}
    for name, target in targets.items():
        if target.resolve() in inputs or _is_same(target, found[name]):
            raise OutputError(f"{target} is an input and would be overwritten; name another output")
        first = owners.setdefault(target, name)
        if first != name:
            raise DataError(f"{first} and {name} would both become {target}; rename one of them")
    return targets


def _is_file(config: RunConfig) -> bool:
    """Tell whether one picture is restored into a file of a given name."""
    output = Path(config.output).expanduser()
    named = output.suffix.lower() in SUFFIXES and not output.is_dir()
    return named and Path(config.input).expanduser().is_file()


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether two names are one file, through links too."""
    return one.exists() and one.samefile(other)


def _record(config: RunConfig, restorer: Restorer) -> Finished | None:
    """Return what the output folder says of its pictures; None for a single file."""
    if _is_file(config):
        return None
    adapter = restorer.adapter_file
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter else "-"
    local = f" local {config.local_means}" if config.local_means else ""
    by = f"{restorer.base.digest[:16]} {digest[:16]}{' x8' if config.ensemble else ''}{local}"
    return Finished(Path(config.output).expanduser(), by)


def _is_there(target: Path, finished: Finished | None) -> bool:
    return target.exists() if finished is None else finished.has(target)


def _pixels(path: Path) -> int:
    """Return the size of a picture for the estimate; 0 if it cannot be read."""
    try:
        height, width = header_size(path)
    except DataError:
        return 0
    return height * width
