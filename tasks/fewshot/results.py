"""The figures of a run: means over its seeds, and the confusion matrix as a file."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.fewshot.evaluate import harmonic_mean
from tasks.fewshot.experiment import Experiment
from tasks.fewshot.sampling import short_classes
from visionlora.io.atomic import write_text_atomically

FIGURES = ("accuracy", "ece", "base", "new", "harmonic_mean")
"""Figures of a run, in the order in which they are shown."""


def summarise(
    experiment: Experiment,
    zero: dict[str, float],
    seeds: list[dict[str, Any]],
    before_seconds: float,
) -> dict[str, Any]:
    """Return the flat figures of a run: means over the seeds, with their spread."""
    config, dataset, backbone = experiment.config, experiment.dataset, experiment.backbone
    result: dict[str, Any] = {
        "task": "fewshot",
        "method": config.method,
        "backbone": config.backbone,
        "pretrained": backbone.pretrained,
        "dataset": config.dataset,
        "setting": config.setting,
        "shots": config.shots,
        "seeds": list(config.seed),
        "classes": len(dataset.classes),
        "test_images": len(dataset.test) - len(experiment.test.skipped),
        "split": dataset.split,
        "test_on": config.test_on,
    }
    # A resumed run may hold seeds of a version that measured less.
    keys = [key for key in FIGURES if all(key in seed for seed in seeds)]
    for key in keys:
        if key in zero:
            result["zero_shot" if key == "accuracy" else f"zero_shot_{key}"] = round(zero[key], 4)
        result |= _mean_and_std(key, [seed[key] for seed in seeds])
    if "base" in result:
        # The harmonic mean belongs to the averages, not the average to the harmonic means.
        result["harmonic_mean"] = round(harmonic_mean(result["base"], result["new"]), 4)
    result["baselines"] = _mean_baselines(seeds)
    if experiment.lr_search is not None:
        result["lr_search"] = experiment.lr_search
        # Also where an earlier part of the run has searched.
        before_seconds += experiment.lr_search["seconds"]
    result |= {
        "trainable_parameters": seeds[0]["trainable_parameters"],
        "total_parameters": sum(p.numel() for p in backbone.clip.parameters()),
        "steps": seeds[0]["steps"],
        "lr": config.lr,
        "step_seconds": float(np.mean([seed["step_seconds"] for seed in seeds])),
        "wall_seconds": round(before_seconds + sum(seed["wall_seconds"] for seed in seeds), 3),
        "skipped_images": len(experiment.test.skipped)
        + max(seed["skipped_train_images"] for seed in seeds),
        "short_classes": len(short_classes(dataset.train, config.shots)),
        "random_weights": backbone.random_weights,
        "per_class": _mean_per_class(seeds),
        "per_seed": [{key: seed[key] for key in ("seed", *keys, "train_loss")} for seed in seeds],
    }
    return result


def _mean_and_std(key: str, values: Sequence[float]) -> dict[str, float]:
    """Return `key` and `key_std`; one seed has no spread: 0, like the mean of one."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {key: round(float(np.mean(values)), 4), f"{key}_std": round(std, 4)}


def _mean_baselines(seeds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return means and spreads of the baselines that were measured with every seed."""
    parts = [seed.get("baselines", {}) for seed in seeds]
    result: dict[str, dict[str, float]] = {}
    for name in parts[0]:
        if all(name in part for part in parts):
            result[name] = {}
            for key in parts[0][name]:
                result[name] |= _mean_and_std(key, [part[name][key] for part in parts])
    return result


def write_matrix(matrix: NDArray[np.int64], classes: tuple[str, ...], folder: Path) -> None:
    """Write confusion.csv: one row per true class, one column per predicted class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    write_text_atomically(folder / "confusion.csv", text.getvalue())


def read_matrix(file: Path) -> NDArray[np.int64]:
    """Read what `write_matrix` wrote."""
    with file.open(encoding="utf-8", newline="") as stream:
        return np.array([row[1:] for row in list(csv.reader(stream))[1:]], dtype=np.int64)


def _mean_per_class(seeds: list[dict[str, Any]]) -> dict[str, float | None]:
    names = seeds[0]["per_class"]
    return {
        name: None
        if value is None
        else round(float(np.mean([seed["per_class"][name] for seed in seeds])), 2)
        for name, value in names.items()
    }
