"""The command `degrade`: a degraded copy of a folder of clean pictures, and what was drawn.

    IN/a/b.jpg  ->  OUT/a/b.png                        and with --pairs
                    OUT/input/a/b.png and OUT/target/a/b.jpg

PNG, so that nothing is lost after the degradation; depth, transparency and grey stay. Stored values
are clamped and rounded. OUT/degradations.json names the parameters of every picture.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.restoration.degradations.chosen import ChosenConfig, degraded, named_pictures
from tasks.restoration.images import read_picture, write_picture
from visionlora.errors import DataError, OutputError
from visionlora.io.atomic import write_atomically, write_text_atomically
from visionlora.training import Progress

FACTS = "degradations.json"


@dataclass(frozen=True, kw_only=True)
class DegradeConfig(ChosenConfig):
    """Write a degraded copy of clean pictures; the parameters go to degradations.json."""

    input: str
    """A picture or a folder of clean pictures."""
    output: str
    """Folder of the copy, new or empty."""
    pairs: bool = False
    """Write input/ and target/, which evaluate and adapt take."""


def run(config: DegradeConfig) -> dict[str, Any]:
    """Write the copy and return what degradations.json holds.

    Raises:
        VisionLoraError: nothing is there or can be written; or some pictures cannot be read, and
            the others are written.
    """
    found = named_pictures(config.input)
    output = Path(config.output).expanduser()
    written = _checked(Path(config.input).expanduser(), output, list(found))
    facts: dict[str, Any] = {**config.described(), "pictures": []}
    failures: list[DataError] = []
    try:
        with Progress(len(found), "degrade") as progress:
            for number, (name, file) in enumerate(found.items()):
                try:
                    drawn = _copy(config, name, file, output, written[name])
                except DataError as error:
                    failures.append(error)
                    print(error, file=sys.stderr, flush=True)
                else:
                    facts["pictures"].append({"picture": name, "file": written[name], **drawn})
                progress.show(number + 1, "")
    finally:
        if facts["pictures"]:
            write_text_atomically(output / FACTS, json.dumps(facts, indent=1) + "\n")
    count = len(facts["pictures"])
    if failures:
        raise DataError(
            f"{len(failures)} of {len(found)} pictures cannot be read ({failures[0]}); "
            f"{count} are degraded"
        )
    print(f"{count} pictures degraded: {output}")
    return facts


def _copy(
    config: DegradeConfig, name: str, file: Path, output: Path, written: str
) -> dict[str, Any]:
    """Write a degraded picture, and its clean one if wanted; return what was drawn."""
    picture = read_picture(file)
    made, drawn = degraded(picture, picture.pixels, config.degradation(), config.generator(name))
    write_picture(output / ("input" if config.pairs else "") / written, made, picture)
    if config.pairs:
        write_atomically(output / "target" / name, lambda path: _same(file, path))
    return drawn


def _same(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _checked(source: Path, output: Path, names: list[str]) -> dict[str, str]:
    """Return the written name of every picture.

    Raises:
        OutputError: the folder is in use, or is inside of the clean pictures.
        DataError: two pictures would be written to one file.
    """
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty; name a new folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{output} is inside of the clean pictures; name a folder outside")
    owners: dict[str, str] = {}
    for name in names:
        written = str(PurePosixPath(name).with_suffix(".png"))
        first = owners.setdefault(written, name)
        if first != name:
            raise DataError(f"{first} and {name} would both become {written}; rename one")
    return {name: written for written, name in owners.items()}
