"""Whole protocols in this process: the cells, the files, continuing, and what is refused before."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tasks.fewshot import train
from tasks.fewshot.protocol import run as protocol
from tasks.fewshot.protocol.config import ProtocolConfig
from tasks.fewshot.shots import Batches
from visionlora.errors import ConfigError, DataError, DivergedError, VisionLoraError

QUICK = {"limit_steps": 3, "limit_test": 60, "batch_size": 8, "checkpoint_every": 2, "seed": [1, 2]}


def run(folder: Path, name: str, **options) -> dict:
    """Carry out a protocol of a few steps into `folder`."""
    return protocol.run(ProtocolConfig(name=name, **{**QUICK, "output": str(folder), **options}))


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))


def trained(folder: Path) -> dict[str, int]:
    """Return when every adapter was written."""
    files = folder.rglob("adapter.safetensors")
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


GRID = "block-lora(layout=grid)+glad"
FEW = {"method": ["lora", GRID], "shots": [1, 2], "baselines": ["prototype"]}


@pytest.fixture(scope="module")
def few_shot(tmp_path_factory):
    """A few-shot table on the digits: its folder and its result."""
    folder = tmp_path_factory.mktemp("protocol") / "few"
    return folder, run(folder, "few-shot", **FEW)


def test_a_table_has_every_cell_and_all_its_files(few_shot):
    folder, result = few_shot
    found = [(row["method"], row["shots"], row["seed"]) for row in rows(folder)]
    methods = [*FEW["method"], *FEW["baselines"]]
    assert len(found) == 3 * 2 * 2
    assert set(found) == {
        (m, str(n), str(s)) for m in methods for n in FEW["shots"] for s in (1, 2)
    }
    for file in ("runs.csv", "summary.csv", "table.md", "plot.png", "result.json", "config.yaml"):
        assert (folder / file).stat().st_size > 0
    text = (folder / "table.md").read_text()
    for method in methods:
        assert text.count(f"| {method} |") == 1
    assert sorted(line["shots"] for line in result["lines"]) == [1] * 3 + [2] * 3


def test_a_cell_is_what_the_ordinary_run_gives(few_shot, tmp_path):
    folder, _ = few_shot
    options = ProtocolConfig(name="few-shot", **QUICK)
    plain = train.run(options.cell(GRID, "digits", 2, output=str(tmp_path / "run")))
    cell = json.loads((folder / "cells/digits" / GRID / "2-shot/result.json").read_text())
    for key in ("accuracy", "accuracy_std", "zero_shot", "trainable_parameters", "lr", "steps"):
        assert cell[key] == plain[key]
    assert [item["accuracy"] for item in cell["per_seed"]] == [
        float(row["accuracy"])
        for row in rows(folder)
        if (row["method"], row["shots"]) == (GRID, "2")
    ]


def test_the_same_command_trains_nothing_again_and_cells_can_be_added(few_shot, tmp_path, capsys):
    folder = tmp_path / "few"
    shutil.copytree(few_shot[0], folder)
    before = trained(folder)
    again = run(folder, "few-shot", **FEW)
    assert "8 of 8 runs are done already" in capsys.readouterr().out
    assert again["lines"] == few_shot[1]["lines"]
    run(folder, "few-shot", **{**FEW, "method": [*FEW["method"], "lora-fa"], "seed": [1]})
    assert len(rows(folder)) == 4 * 2  # one seed only is asked for, the others stay on the disk
    after = trained(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    with pytest.raises(ConfigError, match=r"another configuration: .*steps was 3 and is 4"):
        run(folder, "few-shot", **FEW, limit_steps=4)


def test_an_interrupted_table_continues_to_the_same_figures(
    few_shot, tmp_path, monkeypatch, capsys
):
    calls = []

    def stop(self, step):
        calls.append(step)
        if len(calls) == 3 * 3 + 3:  # the last step of the fourth run
            raise KeyboardInterrupt
        return original(self, step)

    original = Batches.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", "few-shot", **FEW)
    assert "the same command continues" in capsys.readouterr().out
    before = trained(tmp_path / "cut")
    assert len(before) == 3
    assert not (tmp_path / "cut" / "table.md").exists()
    calls.clear()
    monkeypatch.setattr(Batches, "__call__", lambda *a: (calls.append(a[1]), original(*a))[1])
    result = run(tmp_path / "cut", "few-shot", **FEW)
    assert result["lines"] == few_shot[1]["lines"]
    assert calls[0] == 2, "the interrupted run starts from its checkpoint"
    after = trained(tmp_path / "cut")
    assert {name: after[name] for name in before} == before


def test_base_to_new_chooses_rates_without_new_classes(tmp_path):
    options = {"method": ["lora", "lora+glad"], "lr": [0.01, 0.02], "limit_test": 100}
    result = run(tmp_path / "out", "base-to-new", **options, rate_seed=[1])
    for method in options["method"]:
        folder = tmp_path / "out" / "rates" / "digits" / method
        found = json.loads((folder / "rate.json").read_text())
        values = {float(lr): figures[0] for lr, figures in found["validation"].items()}
        assert found["figure"] == "harmonic_mean"
        assert found["lr"] == min(lr for lr in values if values[lr] >= max(values.values()) - 1)
        (table,) = {file.read_text().splitlines()[0] for file in folder.rglob("confusion.csv")}
        assert table == "true,zero,one,two,three,four"
        (line,) = [line for line in result["lines"] if line["method"] == method]
        assert line["lr"] == found["lr"]
    for line in result["lines"]:
        base, new = (line["figures"][key]["mean"] for key in ("base", "new"))
        assert line["figures"]["harmonic_mean"]["mean"] == pytest.approx(
            2 * base * new / (base + new)
        )
    first, second = (
        {
            row["seed"]: float(row["new"])
            for row in rows(tmp_path / "out")
            if row["method"] == method
        }
        for method in options["method"]
    )
    mean = sum(second[seed] - first[seed] for seed in first) / len(first)
    assert result["lines"][1]["differences"]["new"]["mean"] == pytest.approx(mean)
    assert (
        "chosen among 0.01, 0.02 on validation images of the base classes"
        in (tmp_path / "out" / "table.md").read_text()
    )


def test_searched_rates_are_those_of_the_runs_and_their_cost_is_said(tmp_path):
    options = {"method": ["lora"], "shots": [2], "seed": [1], "lr": ["auto"], "limit_test": 20}
    result = run(tmp_path, "few-shot", **options)
    search = json.loads((tmp_path / "cells/digits/lora/2-shot/lr_search.json").read_text())
    assert result["lines"][0]["lr"] == search["lr"]
    said = f"searched on validation images (--lr auto): {search['steps']} steps and"
    assert said in (tmp_path / "table.md").read_text()


@pytest.fixture
def photographs(tmp_path, write_images):
    """Return a function that writes a folder data set and returns its name."""

    def write(name: str, classes: str, count: int = 6) -> str:
        for word in classes.split():
            write_images(tmp_path / name / "train" / word, count)
            write_images(tmp_path / name / "test" / word, 5)
        return f"folder:{tmp_path / name}"

    return write


def test_transfer_tests_the_source_model_on_other_classes(photographs, tmp_path):
    source = photographs("source", "cat dog fox owl")
    same = f"folder:{shutil.copytree(tmp_path / 'source', tmp_path / 'same')}"
    other = photographs("other", "red blue")
    options = {"source": source, "dataset": [same, other], "method": [GRID], "shots": [4]}
    result = run(tmp_path / "out", "cross-dataset", **options)
    found = {
        (row["dataset"], row["seed"]): float(row["accuracy"]) for row in rows(tmp_path / "out")
    }
    for seed in ("1", "2"):
        assert found[same, seed] == found[source, seed], "what is saved is what was tested"
    average = result["lines"][-1]
    assert average["dataset"] == "average"
    mean = sum(found[name, seed] for name in (same, other) for seed in ("1", "2")) / 4
    assert average["figures"]["accuracy"]["mean"] == pytest.approx(mean)
    assert result["zero_shot"]["average"]["accuracy"] == pytest.approx(
        (result["zero_shot"][same]["accuracy"] + result["zero_shot"][other]["accuracy"]) / 2
    )
    assert "average of targets" in (tmp_path / "out" / "table.md").read_text()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("on-*.json")}
    assert len(before) == 4
    assert run(tmp_path / "out", "cross-dataset", **options)["lines"] == result["lines"]
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("on-*.json")} == before


def test_domain_generalisation_reads_imagenet_and_its_variants(tmp_path, write_images):
    root = tmp_path / "data"
    names = {"n01": "tench", "n02": "goldfish", "n03": "hammerhead"}
    for wnid in names:
        write_images(root / "imagenet" / "images" / "train" / wnid, 3)
        write_images(root / "imagenet" / "images" / "val" / wnid, 2)
        write_images(root / "imagenet-sketch" / "images" / wnid, 2)
    for number in range(3):
        write_images(
            root / "imagenetv2" / "imagenetv2-matched-frequency-format-val" / str(number), 2
        )
    for wnid in ("n01", "n03"):
        write_images(root / "imagenet-adversarial" / "imagenet-a" / wnid, 2)
        write_images(root / "imagenet-rendition" / "imagenet-r" / wnid, 2)
    text = "".join(f"{wnid} {name}\n" for wnid, name in names.items())
    (root / "imagenet" / "classnames.txt").write_text(text)
    options = {"root": str(root), "method": ["lora"], "shots": [2], "seed": [1]}
    result = run(tmp_path / "out", "domain-generalisation", **options)
    targets = ["imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"]
    assert [line["dataset"] for line in result["lines"]] == ["imagenet", *targets, "average"]
    # A variant with other classes is another data set, not another domain.
    (root / "imagenet-adversarial" / "classnames.txt").write_text("n01 tench\nn03 tiger shark\n")
    with pytest.raises(DataError, match="'tiger shark' of imagenet-a is no class of imagenet"):
        run(tmp_path / "more", "domain-generalisation", **options)
    assert not (tmp_path / "more").exists()


def test_what_cannot_be_used_is_refused_before_anything_trains(tmp_path, photographs):
    three = photographs("three", "cat dog fox")
    long = photographs("long", "cat dog fox owl")
    (tmp_path / "long" / "classnames.json").write_text(json.dumps({"owl": "owl " * 30}))
    lonely = photographs("lonely", "cat dog fox owl", 1)
    for name, options, message in (
        ("few-shot", {"dataset": ["digits", "dtd"], "root": str(tmp_path)}, "needs CoOp's split"),
        ("few-shot", {"dataset": ["digits", long]}, "longer than the 16 tokens"),
        ("base-to-new", {"dataset": ["digits", three]}, "base-to-new needs at least 4 classes"),
        ("few-shot", {"dataset": [lonely], "lr": [0.1, 0.2]}, "one training image"),
        ("few-shot", {"lr": ["auto"], "shots": [2, 1]}, "one shot a class leaves none"),
        ("few-shot", {"method": ["lora", "lora(rank=99)"]}, "rank"),
        ("cross-dataset", {"source": "digits", "dataset": ["ucf101"]}, "needs CoOp's split"),
    ):
        with pytest.raises(VisionLoraError, match=message) as caught:
            run(tmp_path / "out", name, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_the_control_of_block_lora_trains_the_same_function(tmp_path):
    """LoRA of rank r/n, the same scale, n times the rate of B; only B's weight decay differs."""
    control = "lora(rank=1,alpha=0.7071)+lora+(ratio=2)"
    shipped = Path(__file__).parents[3] / "configs/fewshot/protocols/digits-base-to-new.yaml"
    assert f"- {control}" in shipped.read_text()
    methods = ["block-lora", control, "lora(rank=1)+lora+(ratio=2)"]
    run(tmp_path, "few-shot", method=methods, shots=[2], lr=[0.02], seed=[1], limit_steps=12)
    losses = [
        json.loads((tmp_path / "cells/digits" / method / "2-shot/seed_1/result.json").read_text())[
            "train_loss"
        ]
        for method in methods
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert abs(losses[2] - losses[0]) > 10 * abs(losses[1] - losses[0])


def test_a_cell_that_diverges_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def seed(experiment, *rest):
        if experiment.config.method == "lora-fa":
            raise DivergedError("training diverged: loss nan")
        return original(experiment, *rest)

    original = protocol.run_seed
    monkeypatch.setattr(protocol, "run_seed", seed)
    with pytest.raises(VisionLoraError, match=r"1 cells failed; digits, lora-fa, 1 shot: .* nan"):
        run(tmp_path / "out", "few-shot", method=["lora-fa", "lora"], shots=[1])
    assert [row["method"] for row in rows(tmp_path / "out")] == ["lora", "lora"]
    assert "Failed: digits, lora-fa, 1 shot" in (tmp_path / "out" / "table.md").read_text()


def test_without_a_text_tower_there_is_no_zero_shot_and_no_transfer(photographs, tmp_path):
    options = {"backbone": "timm:test_vit", "pretrained": "none", "method": ["lora"], "shots": [2]}
    data = photographs("data", "cat dog")
    result = run(tmp_path / "out", "few-shot", dataset=[data], seed=[1], image_size=64, **options)
    (adapter,) = (tmp_path / "out").rglob("adapter.json")
    assert json.loads(adapter.read_text())["transform"]["size"] == 64
    assert result["zero_shot"] == {data: {}}
    assert [line["method"] for line in result["lines"]] == ["lora", "linear-probe"]
    assert "zero-shot" not in (tmp_path / "out" / "table.md").read_text()
    other = photographs("other", "red blue")
    with pytest.raises(ConfigError, match="cross-dataset needs a text tower"):
        run(tmp_path / "more", "cross-dataset", source=data, dataset=[other], **options)
