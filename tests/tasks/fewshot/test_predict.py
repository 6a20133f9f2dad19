"""Predictions on many pictures: bounded memory, unreadable files noted, nothing lost by a kill."""

import csv
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ImageFile import ImageFile

import visionlora as vl
from tasks.fewshot import images, predict
from tasks.fewshot.adapter_files import Description, save_adapter
from tasks.fewshot.backbones import load_backbone
from tasks.fewshot.evaluate import BATCH
from visionlora.errors import DataError
from visionlora.training import progress

ROOT = Path(__file__).parents[3]
COUNT = 300
CORRUPT = {"017.png": b"no picture", "123.png": b"", "299.png": b"\x89PNG\r\n\x1a\n cut"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of the tiny model with changes that were drawn instead of trained."""
    folder = tmp_path_factory.mktemp("adapter")
    backbone = load_backbone("tiny")
    vl.inject(backbone.clip, "lora", ["*.attn[q,v]"], rank=2)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in vl.trainable_parameters(backbone.clip):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    description = Description(
        backbone="tiny",
        pretrained=None,
        classes=("zero", "one", "two"),
        templates=("a photo of {}.",),
        transform=backbone.transform.to_dict(),
        method="lora",
        dataset="folder:digits",
    )
    save_adapter(folder, backbone.clip, description)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Some hundred small pictures in two folders, three of which cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        path = folder / f"part{index // 200}" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        if path.name in CORRUPT:
            path.write_bytes(CORRUPT[path.name])
        else:
            Image.fromarray(rng.integers(0, 255, (20, 24), dtype=np.uint8)).save(path)
    return folder


def config(adapter: Path, pictures: Path, output: Path, **options) -> predict.PredictConfig:
    places = {"adapter": str(adapter), "images": str(pictures), "output": str(output)}
    return predict.PredictConfig(**{"grid": 1, **places, **options})  # drawing many takes seconds


def test_corrupt_files_are_named_counted_and_not_fatal(adapter, pictures, tmp_path, capsys):
    found = predict.run(config(adapter, pictures, tmp_path))
    assert (found["predicted"], found["skipped"]) == (COUNT - len(CORRUPT), len(CORRUPT))
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    names = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("*.png"))]
    assert [row["image"] for row in rows] == names
    bad = {Path(row["image"]).name for row in rows if row["error"]}
    assert bad == set(CORRUPT)
    assert all((row["class"] == "") == bool(row["error"]) for row in rows)
    good = [float(row["probability"]) for row in rows if not row["error"]]
    assert min(good) >= 1 / 3 - 1e-4
    printed = capsys.readouterr().out
    assert f"{len(CORRUPT)} of {COUNT} pictures are unreadable" in printed
    assert all(name in printed for name in CORRUPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "predictions.csv"]


def test_never_more_than_one_batch_is_in_memory(adapter, pictures, tmp_path, monkeypatch):
    counts = {"pixels": 0, "open": 0}
    peaks = dict.fromkeys(counts, 0)

    def born(kind: str, thing: object) -> None:
        counts[kind] += 1
        peaks[kind] = max(peaks[kind], counts[kind])
        weakref.finalize(thing, gone, kind)

    def gone(kind: str) -> None:
        counts[kind] -= 1

    decode, load = predict.evaluation_pixels, ImageFile.load

    def counted(source, transform):
        pixels = decode(source, transform)
        born("pixels", pixels)
        return pixels

    def loaded(self):
        if not hasattr(self, "counted"):
            self.counted = True
            born("open", self)
        return load(self)

    monkeypatch.setattr(predict, "evaluation_pixels", counted)
    monkeypatch.setattr(ImageFile, "load", loaded)
    predict.run(config(adapter, pictures, tmp_path))
    assert peaks["pixels"] <= BATCH["cpu"] < COUNT / 2
    assert 0 < peaks["open"] <= 2 * images.DECODE_THREADS


def test_progress_is_said_with_an_estimate(adapter, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "PROGRESS_SECONDS", 0.0)
    predict.run(config(adapter, pictures, tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        f"{min(done, COUNT)}/{COUNT}" for done in range(64, COUNT + 64, 64)
    ]
    assert lines[-1].split(", ")[-1] == "0 s left"
    assert "3 unreadable" in lines[-1]


def test_a_bar_is_shown_on_a_terminal(adapter, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    predict.run(config(adapter, pictures, tmp_path))
    assert f"{COUNT}/{COUNT}" in capsys.readouterr().err


def test_strict_and_hopeless_folders_leave_no_file(adapter, pictures, tmp_path):
    with pytest.raises(DataError, match=r"unreadable picture .*017.png"):
        predict.run(config(adapter, pictures, tmp_path / "strict", strict=True))
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bad" / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 2 pictures .* a\.png: cannot identify"):
        predict.run(config(adapter, tmp_path / "bad", tmp_path / "none"))
    assert not [path for path in tmp_path.rglob("predictions*")]


def test_an_interrupted_run_keeps_the_finished_batches(adapter, pictures, tmp_path, monkeypatch):
    show = predict.Progress.show

    def interrupt(self, step, figures):
        show(self, step, figures)
        if step >= 2 * BATCH["cpu"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict.Progress, "show", interrupt)
    (tmp_path / "predictions.csv").write_text("an older result\n")
    with pytest.raises(KeyboardInterrupt):
        predict.run(config(adapter, pictures, tmp_path))
    assert (tmp_path / "predictions.csv").read_text() == "an older result\n"
    rows = list(csv.DictReader((tmp_path / "predictions.csv.partial").open()))
    assert len(rows) == 2 * BATCH["cpu"]
    monkeypatch.undo()
    predict.run(config(adapter, pictures, tmp_path))
    whole = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert whole[: len(rows)] == rows
    assert len(whole) == COUNT


@pytest.mark.slow
def test_a_killed_process_keeps_the_finished_batches(adapter, pictures, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for copy in range(40):
        for file in sorted(pictures.glob("part0/*.png")):
            os.link(file, many / f"{copy}-{file.name}")
    words = ["predict", "--adapter", str(adapter), "--images", str(many), "--output", "out"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "fewshot.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    partial = tmp_path / "out" / "predictions.csv.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 5000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "predictions.csv").exists()
    rows = list(csv.DictReader(partial.open()))
    assert len(rows) >= BATCH["cpu"]
    assert all(row["class"] or row["error"] for row in rows)
