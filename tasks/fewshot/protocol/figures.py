"""From the figures of single runs to those of a table: means, spreads, differences, averages.

Averages over data sets are taken as the field does: every figure is averaged, and the harmonic
mean is that of the averaged base and new accuracies. Spreads are standard deviations over seeds,
those of an average too. A difference is taken seed by seed, between runs on the same images.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.fewshot.evaluate import harmonic_mean
from visionlora.compose import parse

AVERAGE = "average"
HALVES = ("base", "new", "harmonic_mean")


@dataclass(frozen=True)
class Record:
    """The figures of one run: one seed of one cell, tested on one data set."""

    dataset: str
    method: str
    shots: int
    seed: int
    figures: dict[str, float]
    lr: float
    steps: int
    parameters: int
    split: str
    role: str = "test"
    """`source` and `target` where one data set is trained on and others are tested."""


@dataclass
class Findings:
    """Everything that a protocol found, as it goes on."""

    records: list[Record] = field(default_factory=list)
    zero: dict[str, dict[str, float]] = field(default_factory=dict)
    """Zero-shot figures by data set."""
    splits: dict[str, str] = field(default_factory=dict)
    """Whose division into training and test images, by data set."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a cell has no figures."""
    notes: list[str] = field(default_factory=list)
    """What else belongs below the table."""
    searches: list[dict[str, Any]] = field(default_factory=list)
    """What `--lr auto` found and cost, cell by cell."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; one seed has no deviation."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return those of `values`."""
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), std, len(values))

    def text(self, sign: bool = False) -> str:
        """Return `82.1 ± 0.4`."""
        rounded = round(self.mean, 1) + 0.0  # no -0.0
        mean = f"{rounded:+.1f}" if sign else f"{rounded:.1f}"
        return mean if math.isnan(self.std) else f"{mean} ± {self.std:.1f}"


@dataclass(frozen=True)
class Line:
    """One method on one data set, or on their average: what a table says about it."""

    dataset: str
    method: str
    shots: int
    figures: dict[str, Spread]
    differences: dict[str, Spread]
    """To the method that all are compared with, on the seeds that both have."""
    lr: float
    parameters: int


def lines(records: Iterable[Record], reference: str) -> list[Line]:
    """Return one line per data set, number of shots and method, averages last."""
    records = list(records)
    groups: dict[tuple[str, int, str], dict[int, Record]] = {}
    for record in [*records, *averages(records)]:
        key = (record.dataset, record.shots, record.method)
        groups.setdefault(key, {})[record.seed] = record
    found = []
    for (dataset, shots, method), seeds in groups.items():
        other = groups.get((dataset, shots, reference), {})
        first = next(iter(seeds.values()))
        shared = [seed for seed in seeds if seed in other]
        found.append(
            Line(
                dataset,
                method,
                shots,
                _spreads([record.figures for record in seeds.values()]),
                {
                    key: Spread.of([seeds[s].figures[key] - other[s].figures[key] for s in shared])
                    for key in first.figures
                    if shared
                    and all(key in part[s].figures for part in (seeds, other) for s in shared)
                },
                first.lr,
                first.parameters,
            )
        )
    return found


def averages(records: Sequence[Record]) -> list[Record]:
    """Return the averages over data sets, per method, shots and seed; sources are left out.

    A method is averaged only where it has all data sets, so that averages can be compared.
    """
    tested = [record for record in records if record.role != "source"]
    names = list(dict.fromkeys(record.dataset for record in tested))
    if len(names) < 2:
        return []
    groups: dict[tuple[str, int, int], list[Record]] = {}
    for record in tested:
        groups.setdefault((record.method, record.shots, record.seed), []).append(record)
    return [
        Record(
            AVERAGE,
            method,
            shots,
            seed,
            average([record.figures for record in group]),
            math.nan if len({record.lr for record in group}) > 1 else group[0].lr,
            group[0].steps,
            group[0].parameters,
            "own" if any(record.split == "own" for record in group) else group[0].split,
        )
        for (method, shots, seed), group in groups.items()
        if len(group) == len(names)
    ]


def average(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average every figure that all have; the harmonic mean is that of the averages."""
    keys = [key for key in figures[0] if all(key in item for item in figures)]
    mean = {key: statistics.fmean(item[key] for item in figures) for key in keys}
    if "harmonic_mean" in mean:
        mean["harmonic_mean"] = harmonic_mean(mean["base"], mean["new"])
    return mean


def reference_of(methods: Sequence[str]) -> str:
    """Return the method that the others are compared with: plain LoRA if it is there."""
    for method in methods:
        recipe = parse(method)
        if recipe.method == "lora" and recipe.init is None and not recipe.dynamics:
            return method
    return methods[0]


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a result that tables are made of; none for a missing zero-shot."""
    keys = HALVES if "base" in result else ("accuracy", "ece")
    return {key: float(result[key]) for key in keys if key in result}


def headline(keys: Iterable[str]) -> list[str]:
    """Return the figures that are printed and drawn; files have the calibration error too."""
    return [key for key in keys if key != "ece"]


def _spreads(figures: Sequence[dict[str, float]]) -> dict[str, Spread]:
    keys = [key for key in figures[0] if all(key in item for item in figures)]
    found = {key: Spread.of([item[key] for item in figures]) for key in keys}
    if "harmonic_mean" in found:
        middle = harmonic_mean(found["base"].mean, found["new"].mean)
        found["harmonic_mean"] = Spread(middle, found["harmonic_mean"].std, len(figures))
    return found
