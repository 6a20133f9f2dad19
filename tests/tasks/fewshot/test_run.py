"""Whole runs in this process: figures, seeds, resume, refused data, prediction."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tasks.fewshot import predict, train
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.datasets import load_dataset
from tasks.fewshot.shots import Batches
from visionlora.errors import AdapterFileError, ConfigError, DataError, OutputError

PROMISED = {
    *("task", "method", "backbone", "dataset", "setting", "shots", "seeds", "zero_shot"),
    *("accuracy", "accuracy_std", "trainable_parameters", "step_seconds", "wall_seconds"),
    "peak_memory_mb",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run on the digits with two seeds: its folder and its result."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    config = FewshotConfig(seed=[1, 2], limit_steps=60, limit_test=300, output=str(folder))
    return folder, train.run(config)


def quick(folder, **options) -> FewshotConfig:
    """A run of a few steps into `folder`."""
    base = {"limit_steps": 4, "limit_test": 40, "batch_size": 8, "checkpoint_every": 2}
    return FewshotConfig(**{**base, "output": folder and str(folder), **options})


def test_digits_gain_and_the_result_is_complete(digits):
    folder, result = digits
    assert result == json.loads((folder / "result.json").read_text())
    assert set(result) >= PROMISED
    assert result["zero_shot"] >= 50
    assert result["accuracy"] >= result["zero_shot"] + 12
    assert result["trainable_parameters"] == 6 * 3 * (2 * 64 // 2 + 2 * 64)
    assert result["random_weights"] is False


def test_the_mean_and_spread_are_those_of_the_seeds(digits):
    folder, result = digits
    values = torch.tensor([seed["accuracy"] for seed in result["per_seed"]], dtype=torch.float64)
    assert result["accuracy"] == pytest.approx(values.mean().item(), abs=1e-3)
    assert result["accuracy_std"] == pytest.approx(values.std().item(), abs=1e-3)
    for seed in result["seeds"]:
        own = json.loads((folder / f"seed_{seed}" / "result.json").read_text())
        assert own["accuracy"] in [item["accuracy"] for item in result["per_seed"]]


def test_files_of_a_run(digits):
    folder, result = digits
    Image.open(folder / "confusion.png").verify()
    assert (folder / "config.yaml").is_file()
    lines = (folder / "seed_1" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 60
    rows = list(csv.reader((folder / "seed_2" / "confusion.csv").read_text().splitlines()))
    counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows[1:]])
    assert counts.sum() == result["test_images"] == 300
    right = 100 * counts.diagonal().sum() / counts.sum()
    assert right == pytest.approx(result["per_seed"][1]["accuracy"], abs=1e-3)


def test_a_saved_adapter_predicts_what_the_evaluation_counted(digits, tmp_path):
    folder, result = digits
    dataset = load_dataset("digits")
    step = len(dataset.test) / 300
    truth = {}
    for index in range(0, 300, 5):
        item = dataset.test[int(index * step)]
        name = f"{index:03d}.png"
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(item.source).save(tmp_path / "pictures" / name)
        truth[name] = dataset.classes[item.label]
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    config = {"images": str(tmp_path / "pictures"), "output": str(tmp_path / "out")}
    found = predict.run(predict.PredictConfig(adapter=str(folder), **config))
    assert (found["predicted"], found["skipped"]) == (60, 1)
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["image"] for row in rows] == sorted([*truth, "broken.png"])
    rows = [row for row in rows if not row["error"]]
    assert [row["image"] for row in rows] == sorted(truth)
    right = 100 * sum(truth[row["image"]] == row["class"] for row in rows) / 60
    assert right == pytest.approx(result["per_seed"][0]["accuracy"], abs=12)
    assert right > result["zero_shot"]
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png").convert("L"))
    assert (grid < 128).mean() > 0.2, "the pictures are not in the grid"
    own = predict.run(predict.PredictConfig(adapter=str(folder / "seed_1"), grid=1, **config))
    assert own["predicted"] == 60
    with pytest.raises(DataError, match=r"unreadable picture .*broken"):
        predict.run(predict.PredictConfig(adapter=str(folder), strict=True, **config))


def test_a_routed_adapter_predicts(tmp_path, write_images):
    train.run(quick(tmp_path / "run", method="moe-lora"))
    write_images(tmp_path / "pictures", 2)
    places = {"images": str(tmp_path / "pictures"), "output": str(tmp_path / "out")}
    found = predict.run(predict.PredictConfig(adapter=str(tmp_path / "run"), **places))
    assert found["predicted"] == 2


@pytest.mark.parametrize("damage", ["no description", "other format", "truncated tensors"])
def test_damaged_adapters_are_refused(digits, tmp_path, damage, write_images):
    seed = tmp_path / "seed"
    shutil.copytree(digits[0] / "seed_1", seed)
    if damage == "no description":
        (seed / "adapter.json").unlink()
    elif damage == "other format":
        (seed / "adapter.json").write_text('{"backbone": "tiny"}')
    else:
        data = (seed / "adapter.safetensors").read_bytes()
        (seed / "adapter.safetensors").write_bytes(data[:-100])
    write_images(tmp_path / "pictures", 1)
    with pytest.raises(AdapterFileError) as caught:
        predict.run(predict.PredictConfig(adapter=str(seed), images=str(tmp_path / "pictures")))
    assert "\n" not in str(caught.value)


def test_pictures_must_be_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        predict.run(predict.PredictConfig(adapter="x", images=str(tmp_path / "none")))
    with pytest.raises(DataError, match="no pictures"):
        predict.run(predict.PredictConfig(adapter="x", images=str(tmp_path)))


def test_base_classes_gain_and_both_halves_are_reported(tmp_path):
    config = FewshotConfig(
        setting="base-to-new", limit_steps=40, limit_test=400, output=str(tmp_path / "run")
    )
    result = train.run(config)
    assert result["base"] >= result["zero_shot_base"] + 8
    for prefix in ("", "zero_shot_"):
        base, new = result[f"{prefix}base"], result[f"{prefix}new"]
        assert result[f"{prefix}harmonic_mean"] == pytest.approx(
            2 * base * new / (base + new), abs=1e-3
        )


def test_an_interrupted_run_continues_to_the_same_adapter(tmp_path, monkeypatch):
    whole = train.run(quick(tmp_path / "whole"))

    def stop(self, step):
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step)

    original = Batches.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(quick(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = train.run(quick(tmp_path / "cut", resume=True))
    assert resumed["accuracy"] == whole["accuracy"]
    first, second = (
        load_file(tmp_path / name / "seed_1" / "adapter.safetensors") for name in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resuming_adds_seeds_and_keeps_the_finished_ones(tmp_path):
    first = train.run(quick(tmp_path / "run"))
    tensors = tmp_path / "run" / "seed_1" / "adapter.safetensors"
    before = tensors.stat().st_mtime_ns
    both = train.run(quick(tmp_path / "run", seed=[1, 2], resume=True))
    assert tensors.stat().st_mtime_ns == before
    assert both["per_seed"][0]["accuracy"] == first["accuracy"]
    with pytest.raises(ConfigError, match="another configuration"):
        train.run(quick(tmp_path / "run", lr=0.1, resume=True))
    with pytest.raises(OutputError, match="already holds"):
        train.run(quick(tmp_path / "run"))


@pytest.mark.parametrize("encoder", ["vision", "text"])
def test_one_tower_alone_can_be_trained(tmp_path, encoder):
    result = train.run(quick(tmp_path / "run", encoder=encoder))
    names = load_file(tmp_path / "run" / "seed_1" / "adapter.safetensors")
    assert all(("visual" in name) == (encoder == "vision") for name in names)
    assert result["steps"] == 4


def test_photographs_of_a_folder_train_and_bad_files_are_counted(tmp_path, write_images):
    for name in ("cat", "dog", "red_fox"):
        write_images(tmp_path / "data" / "train" / name, 4)
        write_images(tmp_path / "data" / "test" / name, 3)
    for name in ("train/cat/000.png", "test/dog/001.jpg"):
        (tmp_path / "data" / name).write_bytes(b"")
    config = {"dataset": f"folder:{tmp_path / 'data'}", "shots": 4, "limit_test": None}
    result = train.run(quick(tmp_path / "run", **config))
    assert (result["skipped_images"], result["test_images"]) == (2, 8)
    assert set(result["per_class"]) == {"cat", "dog", "red fox"}
    result = train.run(quick(tmp_path / "more", **{**config, "shots": 9}))
    assert result["short_classes"] == 3
    for shots in (4, 1):  # with one shot the broken picture may never be drawn
        with pytest.raises(DataError, match=r"unreadable image .*000\.png"):
            train.run(quick(tmp_path / "strict", strict=True, **{**config, "shots": shots}))
    assert not (tmp_path / "strict").exists()


def test_a_vit_with_random_weights_trains_and_says_so(tmp_path, small_backbone, capsys):
    config = {"backbone": small_backbone, "pretrained": "none", "params": ["q", "v", "out", "mlp"]}
    result = train.run(quick(tmp_path / "run", **config))
    assert result["random_weights"] is True
    assert "random weights" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": {"rank": 128, "blocks": 128}}, "rank"),
        ({"params": ["qkv"]}, "--params"),
        ({"device": "cuda:99"}, "not there"),
        ({"device": "gpu"}, "none of auto"),
    ],
)
def test_a_refused_run_writes_nothing(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train.run(quick(tmp_path / "deep" / "run", **options))
    assert list(tmp_path.iterdir()) == []


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.run(quick(None, limit_steps=1))
    names = sorted(path.name for path in (tmp_path / "runs" / "fewshot").iterdir())
    assert names == ["digits-tiny-block-lora-16shot", "digits-tiny-block-lora-16shot-2"]
