"""The command `preview`: a sheet of degraded patches as training sees them, and what was drawn.

Every row is a picture: its middle, cut to a patch, clean and in several draws. Below each draw
stand the PSNR of the result, and the functions in the order in which they were applied.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.restoration.degradations.base import Drawn
from tasks.restoration.degradations.chosen import ChosenConfig, degraded, named_pictures
from tasks.restoration.images import Levels, Picture, read_picture, to_levels, write_picture
from tasks.restoration.metrics import psnr
from tasks.restoration.pairs.sources import Patch, cut
from tasks.restoration.sheet import Cell, sheet
from visionlora.errors import ConfigError, DataError
from visionlora.io.atomic import write_text_atomically

SHOWN = 224
"""Smaller patches are magnified by the whole number that brings them to at least this side."""
UNITS = {"angle": "°", "slant": "°", "length": " px"}


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(ChosenConfig):
    """Draw a sheet of degraded patches, and write what was drawn as JSON beside it."""

    input: str
    """A picture or a folder of clean pictures."""
    output: str = "sheet.png"
    """The sheet, a PNG; the drawn parameters go into the same name with .json."""
    pictures: int = 4
    """Rows of the sheet: the first pictures of the folder."""
    draws: int = 5
    """Degraded columns of the sheet."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        for name in ("pictures", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if Path(self.output).suffix.lower() != ".png":
            raise ConfigError(f"--output is a sheet *.png, got {self.output!r}")


def run(config: PreviewConfig) -> dict[str, Any]:
    """Write the sheet and the JSON, and return what the JSON holds.

    Raises:
        VisionLoraError: no picture can be read, or nothing can be written.
    """
    found = named_pictures(config.input)
    rows: list[list[Cell]] = []
    listed: list[dict[str, Any]] = []
    for name, file in found.items():
        if len(rows) == config.pictures:
            break
        try:
            picture = read_picture(file)
        except DataError as error:
            print(f"note: {error}", file=sys.stderr)
            continue
        row, draws = drawn_row(config, name, picture)
        rows.append(row)
        listed.append({"picture": name, "draws": draws})
    if not rows:
        raise DataError(f"no picture in {config.input} can be read")
    output = Path(config.output).expanduser()
    made = sheet(rows)
    write_picture(output, made.astype(np.float32) / 255, Picture(made))
    facts = {**config.described(), "pictures": listed}
    text = write_text_atomically(output.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    print(f"wrote {output} and {text}")
    return facts


def drawn_row(
    config: PreviewConfig, name: str, picture: Picture
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Return the cells of a picture, and what was drawn for each."""
    degradation = config.degradation()
    clean = middle(picture, config.patch)
    row, draws = [(shown(clean), name)], []
    for number in range(config.draws):
        made, drawn = degraded(picture, clean, degradation, config.generator(name, number))
        quality = psnr(to_levels(made), to_levels(clean))
        row.append((shown(made), f"{quality:.1f} dB\n{caption(drawn)}"))
        draws.append({**drawn, "psnr": round(quality, 3) if np.isfinite(quality) else None})
    return row, draws


def middle(picture: Picture, side: int) -> Patch:
    """Cut the patch in the middle of a picture."""
    top, left = (max(0, (extent - side) // 2) for extent in picture.size)
    return cut(picture.levels, (top, left), side)


def shown(patch: Patch) -> Levels:
    """Return a patch as it is drawn, small ones magnified without smoothing."""
    factor = max(1, -(-SHOWN // patch.shape[0]))
    return to_levels(patch).repeat(factor, axis=0).repeat(factor, axis=1)


def caption(drawn: Drawn) -> str:
    """Write drawn parameters for people, a line for each function."""
    steps = drawn.get("steps", [drawn])
    lines = [" ".join(filter(None, map(_word, step, step.values()))) for step in steps]
    return "\n".join(lines) or "clean"


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else ""
    if isinstance(value, str):
        return value
    numbers = value if isinstance(value, list) else [value]
    digits = "/".join(f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in numbers)
    return f"{name} {digits}{UNITS.get(name, '')}"
