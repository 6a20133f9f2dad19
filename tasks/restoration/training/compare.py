"""The command `compare`: several methods x seeds x numbers of training pictures, side by side.

runs/<method>-n<pictures>-s<seed>/    one adaptation each, see adapt.py; finished ones are kept
runs.csv                              the figures of every run
table.md, summary.csv, result.json    mean and spread over seeds
plot.png                              test PSNR against training pictures, or against methods

All runs share base, test pictures and settings, so what differs is the method, the seed of its
initial values and patches, and how many pictures it sees. A comparison that was stopped goes on
where it was with --resume; further methods and seeds may be added then.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.restoration.pairs.split import split
from tasks.restoration.training import adapt
from tasks.restoration.training.comparison import (
    Line,
    Record,
    markdown,
    runs_csv,
    summarised,
    summary_csv,
)
from tasks.restoration.training.comparison_plot import save_plot
from tasks.restoration.training.config import AdaptConfig, CompareConfig
from tasks.restoration.training.fitting import MAY_CHANGE
from tasks.restoration.training.held_out import Pictures
from visionlora.errors import DataError, OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training import RunDirectory
from visionlora.training.output import open_run, taken_back_on_error
from visionlora.training.rundir import VOLATILE, check_same, plain

DEFAULT = Path("runs/restoration/compare")
MAY_GROW = ("methods", "seeds", "train_images", "lr", "adapter")
"""Settings that may differ when a comparison goes on; each run checks its own."""
FIGURES = ("test_psnr", "test_ssim", "test_psnr_input", "test_psnr_base", "trainable_percent")


def run(config: CompareConfig) -> dict[str, Any]:
    """Carry out a comparison and return what is written to its result.json.

    Raises:
        VisionLoraError: a setting, data or a file that cannot be used; finished runs are kept.
    """
    _check_counts(config)
    directory, made = open_run(
        config.output, DEFAULT, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config, volatile=(*VOLATILE, *MAY_GROW))
    plan = [
        (method, count, seed)
        for count in config.train_images
        for seed in config.seeds
        for method in config.methods
    ]
    records: list[Record] = []
    for number, (method, count, seed) in enumerate(plan, 1):
        label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{method}-n{count}-s{seed}")
        folder = directory.path / "runs" / label
        single = config.single(method, count, seed, str(folder))
        found = None if config.overwrite else finished(folder, single)
        done = found or _run(single, replace=config.overwrite)
        figures = {name: float(done[name]) for name in FIGURES}
        records.append(Record(method, count, seed, figures))
        state = "kept" if found else f"{done['seconds']:.0f} s"
        print(
            f"[{number}/{len(plan)}] {label}: {figures['test_psnr']:.2f} dB ({state})", flush=True
        )
    return _write(config, records, directory)


def _check_counts(config: CompareConfig) -> None:
    """Refuse more training pictures than there are before the first run, not at the last."""
    names = Pictures(config.data, config.layout).names
    validation = 0 if config.val else config.val_images
    split(names, test=config.test_images, validation=validation, train=max(config.train_images))


def finished(folder: Path, config: AdaptConfig) -> dict[str, Any] | None:
    """Return the result of a run, None if it is not finished.

    Raises:
        ConfigError: the run in the folder had other settings.
        DataError: its result cannot be read.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_same(result["config"], plain(config), f"{folder}", MAY_CHANGE)
        if not all(name in result for name in FIGURES):
            raise KeyError("figures of test pictures")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {folder}") from error
    return result


def _run(config: AdaptConfig, *, replace: bool) -> dict[str, Any]:
    """Adapt, with nothing on the screen."""
    if replace:
        config = AdaptConfig(**{**vars(config), "resume": False, "overwrite": True})
    return adapt.run(config, say=lambda _: None)


def _write(
    config: CompareConfig, records: Sequence[Record], directory: RunDirectory
) -> dict[str, Any]:
    """Write tables and plot, print the table, and return result.json's content."""
    lines = summarised(records)
    zero = {
        "input": _mean(records, "test_psnr_input"),
        "base alone": _mean(records, "test_psnr_base"),
    }
    title = f"{config.task}: test PSNR in dB, mean ± standard deviation of seeds " + ", ".join(
        map(str, config.seeds)
    )
    text = markdown(lines, zero, title)
    folder = directory.path
    try:
        write_text_atomically(folder / "table.md", text)
        write_text_atomically(folder / "runs.csv", runs_csv(records))
        write_text_atomically(folder / "summary.csv", summary_csv(lines))
        save_plot(lines, zero, title, folder / "plot.png")
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    print(text)
    print(f"table: {folder / 'table.md'}, plot: {folder / 'plot.png'}")
    return directory.write_result(
        {
            "task": config.task,
            "base": config.base,
            "data": config.data,
            "test_images": config.test_images,
            "seeds": config.seeds,
            **{f"psnr_{name.split()[0]}": round(value, 4) for name, value in zero.items()},
            "lines": [_plain(line) for line in lines],
        }
    )


def _mean(records: Sequence[Record], figure: str) -> float:
    return sum(record.figures[figure] for record in records) / len(records)


def _plain(line: Line) -> dict[str, Any]:
    return {
        "method": line.method,
        "train_images": line.count,
        "seeds": line.seeds,
        "psnr": round(line.psnr, 4),
        "psnr_std": round(line.psnr_std, 4),
        "ssim": round(line.ssim, 5),
        "trainable_percent": round(line.percent, 4),
    }
