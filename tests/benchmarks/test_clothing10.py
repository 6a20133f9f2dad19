"""The clothing table: what it chooses on, what it keeps, how it continues."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import clothing10
from benchmarks.clothing10 import ARMS, PROBE, STEPS, Arm, Bench, Run, summary, table
from tasks.fewshot.evaluate import Scores


def scores(right: int, of: int = 10) -> Scores:
    """Return sure scores, so many of them right."""
    logits = np.zeros((of, 2), dtype=np.float32)
    logits[:right, 0] = logits[right:, 1] = 9
    return Scores(logits, np.zeros(of, dtype=np.int64))


class Told(Bench):
    """A bench whose trainings have known outcomes: validation by rate, test by seed."""

    def __init__(self, validation: dict[float, float]) -> None:
        self.validation = validation
        self.calls: list[tuple[float, int]] = []

    def experiment(self, settings, shots):
        return None

    def run(self, experiment, rate, seed, beyond=-1.0):
        self.calls.append((rate, seed))
        value = self.validation[rate]
        return Run(value, scores(seed + round(rate)) if value > beyond else None, 7)


def test_the_rate_is_the_best_on_validation_images_and_serves_all_seeds(monkeypatch):
    monkeypatch.setitem(clothing10.ARMS, "lora", replace(ARMS["lora"], rates=(1.0, 2.0, 3.0)))
    bench = Told({1.0: 50.0, 2.0: 70.0, 3.0: 60.0})
    row = bench.train("lora", 16)
    assert row["lr"] == 2.0
    assert bench.calls == [(1.0, 1), (2.0, 1), (3.0, 1), (2.0, 2), (2.0, 3)]
    assert row["accuracies"] == [30.0, 40.0, 50.0]
    assert row["tried"] == {"1": 50.0, "2": 70.0, "3": 60.0}


def test_of_equally_good_rates_the_smallest_is_taken_with_its_own_test_scores(monkeypatch):
    monkeypatch.setitem(clothing10.ARMS, "lora", Arm({}, (1.0, 2.0)))
    row = Told({1.0: 50.0, 2.0: 50.0}).train("lora", 16)
    assert row["lr"] == 1.0
    assert row["accuracies"][0] == 20.0


def test_means_and_spreads():
    found = summary([scores(5), scores(7)])
    assert found["accuracy"] == 60.0
    assert found["std"] == pytest.approx(10 * 2**0.5, abs=0.01)
    assert found["ece"] == pytest.approx(40, abs=0.1)


def test_a_table_shows_what_is_there():
    row = {"arm": PROBE, "shots": 4, "accuracy": 60.04, "std": 1.26, "ece": 3.0}
    lines = table([row]).splitlines()
    assert len(lines) == 2 + len(STEPS)
    assert lines[4] == "| 4 | 60.0 ± 1.3 | 3.0 |  |  |  |  |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)
