"""The command `evaluate`: restore degraded pictures and compare them with their targets.

    metrics.csv          PSNR and SSIM of every picture and of its input, in RGB and in Y
    result.json          the means, the convention they follow, the cost of adapter and network
    worst.png best.png   pictures that lost or gained most, with maps of what differs
    restored/            the restored pictures, with --save

Restored values are clamped and rounded to 8 bits before they are measured. A pair that cannot be
read, or whose halves differ in size, is left out: the others are measured, and the run ends with an
error.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tasks.restoration.figures import Measured, means, quality, write_table
from tasks.restoration.images import Levels, Picture, to_levels, write_levels
from tasks.restoration.inference.restorer import Restorer, RestorerConfig
from tasks.restoration.metrics import Channel
from tasks.restoration.pairs.layouts import AUTO
from tasks.restoration.pairs.sources import PAIRS
from tasks.restoration.perceptual import Distance, load_lpips
from tasks.restoration.pictures import Extremes, shown
from tasks.restoration.report import lines, result_of
from tasks.restoration.training.held_out import Example, Pictures
from visionlora.errors import ConfigError, DataError
from visionlora.training import Progress
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/restoration")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RestorerConfig):
    """Restore degraded pictures and compare them with their targets."""

    data: str
    """Folder of pairs, or TASK:FOLDER of clean pictures, as in derain:photos."""
    task: str | None = None
    """What the pictures need, as in denoise; by default that of the adapter."""
    layout: str = AUTO
    """How pairs lie on disk, see `check`; found out by default."""
    part: Literal["all", "test", "validation"] = "all"
    """test: only the pairs that the adapter was neither trained nor chosen on."""
    channel: Channel = "rgb"
    """rgb, or y for the luma: which figures psnr and ssim of result.json are; both are written."""
    crop: int = 0
    """Border that is not measured; super-resolution by n is given with n."""
    lpips: bool = True
    """Whether LPIPS is measured too, if its package and weights are there."""
    rows: int = 4
    """Pictures of the sheets of the worst and the best ones; 0 for no sheets."""
    save: bool = False
    """Write the restored pictures."""
    seed: int = 0
    """Of the degradation, where clean pictures are given."""
    output: str | None = None
    """Folder of the results; by default a name below runs/restoration, numbered if taken."""
    overwrite: bool = False
    """Replace the results in the output folder."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        for name in ("crop", "rows", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.task is not None and not self.task.strip():
            raise ConfigError("--task must not be empty")
        if self.part != "all" and self.adapter is None:
            raise ConfigError(f"--part {self.part} needs --adapter, which knows its parts")


def run(config: EvaluateConfig, restorer: Restorer | None = None) -> dict[str, Any]:
    """Carry out an evaluation and return what is written to its result.json.

    Args:
        config: the settings.
        restorer: the network itself, instead of the one that `config` names.

    Raises:
        VisionLoraError: a setting, network or folder that cannot be used; or pairs that cannot be
            read, after the others were measured.
    """
    listed = Pictures(config.data, config.layout)
    restorer = restorer or Restorer(config)
    task = _task(config, restorer, listed)
    chosen = _chosen(config, restorer, listed.names)
    default = RUNS / f"evaluate-{task}-{Path(restorer.base.name).stem.replace(':', '-')}"
    directory, made = open_run(config.output, default, resume=False, overwrite=config.overwrite)
    extremes = Extremes(config.rows, config.channel)
    with taken_back_on_error(made):
        measured, failures = _measured(config, restorer, listed, chosen, extremes, directory.path)
    directory.write_config(config)
    write_table(directory.path / "metrics.csv", measured)
    extremes.write(directory.path)
    found = means(measured)
    result = {
        "task": task,
        "data": config.data,
        "part": config.part,
        "failed": {name: str(error) for name, error in failures.items()},
        **result_of(restorer, measured, found, config.channel, config.crop),
    }
    for line in lines(restorer, measured, found, config.channel):
        print(line)
    written = directory.write_result(result)
    print(f"figures and pictures: {directory.path}")
    if failures:
        raise DataError(
            f"{len(failures)} of {len(chosen)} pairs cannot be measured "
            f"({next(iter(failures.values()))}); the figures are of the other {len(measured)}"
        )
    return written


def _measured(
    config: EvaluateConfig,
    restorer: Restorer,
    listed: Pictures,
    chosen: Sequence[int],
    extremes: Extremes,
    folder: Path,
) -> tuple[list[Measured], dict[str, DataError]]:
    """Restore and measure all pictures; return with their figures what cannot be measured.

    Raises:
        DataError: nothing can be measured.
    """
    distance = load_lpips(restorer.device) if config.lpips else None
    if isinstance(distance, str):
        print(f"note: {distance}")
        distance = None
    measured: list[Measured] = []
    failures: dict[str, DataError] = {}
    with Progress(len(chosen), "evaluate") as progress:
        for number, index in enumerate(chosen, 1):
            name = listed.names[index]
            try:
                example = listed.example(index, None, config.seed)
                item, picture = _measure(config, restorer, example, distance)
            except DataError as error:
                failures[name] = error
                print(f"left out: {error}", file=sys.stderr, flush=True)
                continue
            measured.append(item)
            extremes.add(item, shown(name, to_levels(example.degraded), picture, example.clean))
            if config.save:
                path = folder / "restored" / f"{name}.png"
                write_levels(path, picture, Picture(picture, grey=example.grey))
            progress.show(number, f"{item.gain(config.channel):+.2f} dB")
    if not measured:
        raise DataError(f"no pair can be measured: {next(iter(failures.values()))}")
    return measured, failures


def _measure(
    config: EvaluateConfig, restorer: Restorer, example: Example, distance: Distance | None
) -> tuple[Measured, Levels]:
    """Restore a picture; return its figures and what became of it, in 8 bits.

    Raises:
        DataError: it cannot be restored or measured.
    """
    began = time.perf_counter()
    pixels = restorer(example.degraded)
    seconds = time.perf_counter() - began
    if example.grey:  # it is written without colours, too
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    restored = to_levels(pixels)
    before, after = (
        quality(picture, example.clean, config.crop)
        for picture in (to_levels(example.degraded), restored)
    )
    if distance is not None:
        before["lpips"] = distance(to_levels(example.degraded), example.clean)
        after["lpips"] = distance(restored, example.clean)
    height, width = restored.shape[:2]
    return Measured(example.name, (height, width), before, after, seconds), restored


def _task(config: EvaluateConfig, restorer: Restorer, listed: Pictures) -> str:
    """Return the task, and note if the adapter is of another one."""
    own = restorer.card.task if restorer.card else None
    task = config.task or own or (listed.kind if listed.kind != PAIRS else None)
    if task is None:
        raise ConfigError("--task is missing: say what the pictures need, as in denoise")
    if own is not None and own != task:
        print(f"note: the adapter is of {own}, the pictures are of {task}")
    return task


def _chosen(config: EvaluateConfig, restorer: Restorer, names: Sequence[str]) -> list[int]:
    """Return which pairs are measured, and note if the adapter has seen some of them.

    Raises:
        DataError: the part is empty.
    """
    parts = restorer.card.parts if restorer.card else {}
    seen = {*parts.get("train", ()), *parts.get("validation", ())}
    if config.part == "all":
        known = sum(name in seen for name in names)
        if known:
            print(
                f"note: {known} of {len(names)} pictures have names of pictures that the adapter "
                "was trained or chosen on; --part test leaves them out"
            )
        return list(range(len(names)))
    own = set(parts.get(config.part, ()))
    if config.part == "test" and not own:
        own = set(names) - seen
    chosen = [index for index, name in enumerate(names) if name in own]
    if not chosen:
        raise DataError(f"no picture of {config.data} is in the {config.part} part of the adapter")
    return chosen
