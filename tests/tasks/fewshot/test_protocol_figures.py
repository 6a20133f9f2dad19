"""Means, spreads, paired differences, averages and tables are those of the literature."""

import csv
import math

import pytest
from PIL import Image
from rich.console import Console

from tasks.fewshot.evaluate import harmonic_mean
from tasks.fewshot.protocol.config import ProtocolConfig
from tasks.fewshot.protocol.figures import (
    AVERAGE,
    Record,
    Spread,
    average,
    averages,
    lines,
    reference_of,
)
from tasks.fewshot.protocol.plot import save_plot
from tasks.fewshot.protocol.progress import Progress, duration
from tasks.fewshot.protocol.rates import gentlest
from tasks.fewshot.protocol.tables import Grid, grids, runs_csv, summary_csv
from tasks.fewshot.protocol.write import _print
from tasks.fewshot.report import result_table

BASE = {"lora": (80.0, 90.0), "glad": (82.0, 88.0)}
NEW = {"lora": (60.0, 50.0), "glad": (63.0, 57.0)}


def halves(base: float, new: float) -> dict[str, float]:
    return {"base": base, "new": new, "harmonic_mean": harmonic_mean(base, new)}


def record(dataset: str, method: str, seed: int, figures: dict[str, float], **more) -> Record:
    values = {"shots": 16, "lr": 0.1, "steps": 5, "parameters": 1234, "split": "zhou", **more}
    return Record(dataset=dataset, method=method, seed=seed, figures=figures, **values)


def table(dataset: str = "a") -> list[Record]:
    return [
        record(dataset, method, seed, halves(BASE[method][seed - 1], NEW[method][seed - 1]))
        for method in BASE
        for seed in (1, 2)
    ]


def test_harmonic_mean_of_an_average_is_that_of_the_averaged_halves():
    published = average([halves(60.0, 80.0), halves(78.68, 68.44)])
    assert published["base"] == pytest.approx(69.34)
    assert published["new"] == pytest.approx(74.22)
    assert published["harmonic_mean"] == pytest.approx(71.70, abs=5e-3)
    assert published["harmonic_mean"] != pytest.approx(
        (harmonic_mean(60.0, 80.0) + harmonic_mean(78.68, 68.44)) / 2, abs=0.1
    )


def test_differences_are_taken_seed_by_seed():
    _, glad = lines(table(), "lora")
    difference = glad.differences["new"]
    assert difference.mean == pytest.approx((3.0 + 7.0) / 2)
    assert difference.std == pytest.approx(math.sqrt(8.0))  # of 3 and 7
    assert glad.differences["base"].mean == pytest.approx(0.0)
    lora, _ = lines(table(), "lora")
    assert all(item.mean == item.std == 0 for item in lora.differences.values())


def test_differences_need_the_same_seed():
    records = [item for item in table() if (item.method, item.seed) != ("lora", 1)]
    _, glad = sorted(lines(records, "lora"), key=lambda line: line.method != "lora")
    assert glad.differences["new"].count == 1
    assert glad.differences["new"].mean == pytest.approx(7.0)


def test_harmonic_mean_of_a_line_is_that_of_its_mean_halves():
    lora, _ = lines(table(), "lora")
    assert lora.figures["harmonic_mean"].mean == pytest.approx(harmonic_mean(85.0, 55.0))


def test_averages_leave_out_sources_and_incomplete_methods():
    def run(dataset, method, accuracy, role="target"):
        return record(dataset, method, 1, {"accuracy": accuracy}, role=role)

    records = [
        *(run("imagenet", method, 99.0, "source") for method in ("lora", "dora")),
        *(run("a", method, 50.0) for method in ("lora", "dora")),
        run("b", "lora", 70.0),
    ]
    (found,) = averages(records)
    assert (found.dataset, found.method) == (AVERAGE, "lora")
    assert found.figures == {"accuracy": 60.0}
    assert averages([run("a", "lora", 50.0)]) == []


def test_one_seed_has_no_spread():
    assert Spread.of([82.06]).text() == "82.1"
    assert Spread.of([80.0, 82.0]).text() == "81.0 ± 1.4"
    assert Spread.of([-0.01]).text(sign=True) == "+0.0"


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["block-lora", "lora+glad", "lora"], "lora"),
        (["block-lora", "lora(rank=4)"], "lora(rank=4)"),
        (["block-lora", "lora+glad"], "block-lora"),
    ],
)
def test_plain_lora_is_what_others_are_compared_with(methods, expected):
    assert reference_of(methods) == expected


def test_halves_are_tabulated_with_differences_and_marked_splits():
    config = ProtocolConfig(name="base-to-new", method=["lora"], dataset=["a", "b"])
    records = [*table("a"), *table("b")]
    zero = {"a": halves(70.0, 50.0), "b": halves(60.0, 50.0)}
    zero[AVERAGE] = average(list(zero.values()))
    found = grids(config, lines(records, "lora"), zero, {"a": "own", "b": "zhou"}, "lora")
    assert [grid.title for grid in found] == ["a (own split)", "b", AVERAGE]
    for grid in found:
        assert all(len(row) == len(grid.columns) for row in grid.rows)
        assert [row[0] for row in grid.rows] == ["zero-shot", "lora", "glad"]
    assert found[2].rows[2][4:6] == ["+0.0 ± 2.8", "+5.0 ± 2.8"]
    text = found[0].markdown().splitlines()
    assert text[0] == "**a (own split)**"
    assert {line.count("|") for line in text[2:]} == {len(found[0].columns) + 1}


def test_csv_files_hold_every_run_and_every_line():
    records = table()
    rows = list(csv.DictReader(runs_csv(records).splitlines()))
    assert [float(row["new"]) for row in rows] == [*NEW["lora"], *NEW["glad"]]
    text = summary_csv(lines(records, "lora"), {"a": halves(70.0, 50.0)}, "lora")
    zero, lora, glad = csv.DictReader(text.splitlines())
    assert (zero["method"], float(zero["base"])) == ("zero-shot", 70.0)
    assert float(lora["base_std"]) == pytest.approx(math.sqrt(50.0), abs=1e-4)
    assert float(glad["new_minus_lora"]) == 5.0


@pytest.mark.parametrize("shots", [(16,), (1, 4, 16)])
def test_the_plot_has_a_panel_per_figure_and_a_line_per_method(tmp_path, shots):
    records = [
        record("a", method, seed, {"accuracy": 60.0 + shot + seed}, shots=shot)
        for method in ("lora", "glad")
        for shot in shots
        for seed in (1, 2)
    ]
    zero = {"a": {"accuracy": 55.0}}
    path = save_plot(records, lines(records, "lora"), zero, "few-shot", tmp_path / "plot.png")
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14), (128, 128, 128)} <= colours


def test_the_estimate_weighs_methods_by_what_they_cost():
    planned = {("a", "lora"): 10, ("b", "lora"): 10, ("c", "glad"): 10, ("d", "glad"): 30}
    progress = Progress(planned, 0, enabled=False)
    progress.done(("a", "lora"), "")
    progress.done(("c", "glad"), "")
    progress.spent = {"lora": [1.0], "glad": [2.0]}
    assert progress.left() == pytest.approx(10 * 1.0 + 30 * 2.0)
    progress.drop(("d", "glad"))
    assert progress.left() == pytest.approx(10.0)
    assert [duration(value) for value in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({0.1: 70.0, 0.2: 80.0, 0.4: 80.5, 0.8: 60.0}, 0.2),
        ({0.1: 70.0, 0.2: 80.0, 0.4: 90.0}, 0.4),
        ({0.1: 99.9, 0.4: 100.0}, 0.1),
    ],
)
def test_of_rates_that_cannot_be_told_apart_the_smallest_is_taken(means, expected):
    assert gentlest(means) == expected


def test_names_are_printed_as_they_are(capsys):
    """A colon before a name and after it is no picture, and brackets are no markup."""
    result = {
        "dataset": "folder:five", "backbone": "tiny", "method": "lora(targets=[q])", "shots": 4,
        "per_seed": [],
    }  # fmt: skip
    console = Console(width=200)
    console.print(result_table(result))
    _print(Grid("folder:five: x", ["method", "folder:cat: y"], [["lora[q]", "1.0"]]), [])
    printed = capsys.readouterr().out
    for name in ("folder:five: tiny, lora(targets=[q])", "folder:five: x", "folder:cat: y"):
        assert name in printed
