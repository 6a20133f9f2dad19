"""Training as a whole: what is learnt, saved, resumed, shared and refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import visionlora as vl
from tasks.tracking.model import VARIANTS, build
from tasks.tracking.training import train
from tasks.tracking.training.batches import Batches
from tasks.tracking.training.config import TrainConfig
from tasks.tracking.training.data import load_source
from tasks.tracking.training.objective import pair_loss, pair_overlap, predict
from tasks.tracking.training.optimizer import build_optimizer
from tasks.tracking.training.samples import Samples
from tests.pair import run_pair
from tests.tasks.tracking.training_toy import SHAPE, TOY, toy_config, write_data
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, DataError, OutputError
from visionlora.training import RunDirectory, TrainSettings, fit

TOY_FILE = "tests/tasks/tracking/training_toy.py"


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(VARIANTS, "toy", TOY)
    monkeypatch.setattr(train, "MEASURED", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def fresh(method="lorat", **options):
    return build("toy", method=method, backbone_weights="random", **options)


def batches(data, size=4):
    return Batches(Samples(load_source([data], ".", None, SHAPE), SHAPE, 0), size)


def tensors(folder, name="adapter.safetensors"):
    return load_file(folder / name)


def assert_equal_files(one, two, name="adapter.safetensors"):
    first, second = tensors(one, name), tensors(two, name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_run_leaves_a_tracker_in_both_formats_that_predicts_what_was_trained(data, tmp_path):
    result = train.run(toy_config(data, tmp_path / "run", steps=3, lr=1e-2))
    assert result["files"] == ["adapter.safetensors", "lorat.safetensors"]
    assert (result["steps"], result["pairs"], result["skipped_steps"]) == (3, 12, 0)
    assert 0 <= result["train_iou"] <= 1
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["trainable_parameters"] == result["trainable_parameters"]
    assert stored["task"] == "tracking"

    batch = batches(data)(0)
    loaded = [fresh(weights=tmp_path / "run" / name) for name in result["files"]]
    with torch.no_grad():
        untrained, ours, released = (predict(model, batch) for model in [fresh(), *loaded])
    assert_close(ours.score, released.score)
    assert_close(ours.boxes, released.boxes)
    assert (ours.boxes - untrained.boxes).abs().max() > 1e-3


def test_every_trainable_tensor_gets_a_gradient_and_nothing_else_does(data):
    model = fresh().train()
    pair_loss(model, batches(data)(0)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    trained = {name for name, _ in vl.trainable_parameters(model)}
    assert {name.split(".")[0] for name in trained} == {"embedding", "head", "blocks"}


def test_checkpoints_hold_what_is_trained_and_runs_are_not_overwritten(data, tmp_path):
    config = toy_config(data, tmp_path / "run", steps=1, checkpoint_every=1, keep_checkpoints=1)
    train.run(config)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    trained = sum(p.numel() for _, p in vl.trainable_parameters(fresh()))
    whole = sum(p.numel() for p in fresh().parameters())
    assert 3 * 4 * trained < size < 3 * 4 * trained + 4 * (whole - trained)
    with pytest.raises(OutputError, match="already holds a finished run"):
        train.run(config)


def interrupted(config, step, monkeypatch):
    """Run until the batch of a step is asked for, then stop as Ctrl-C does."""
    made = Batches.__call__

    def stopping(self, wanted):
        if wanted == step:
            raise KeyboardInterrupt
        return made(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "toy", TOY.__class__(**{**vars(TOY), "drop_path": 0.3}))
    whole = train.run(toy_config(data, tmp_path / "whole", checkpoint_every=2, steps=5))
    part = toy_config(data, tmp_path / "part", checkpoint_every=2, steps=5)
    interrupted(part, 3, monkeypatch)
    again = toy_config(data, tmp_path / "part", checkpoint_every=2, steps=5, resume=True, workers=1)
    resumed = train.run(again)
    assert resumed["loss"] == whole["loss"]
    assert_equal_files(tmp_path / "whole", tmp_path / "part")
    with pytest.raises(ConfigError, match=r"lr was 0\.001 and is 0\.1"):
        train.run(toy_config(data, tmp_path / "part", steps=5, lr=0.1, resume=True))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(data, tmp_path):
    options = {"data": data, "output": str(tmp_path / "pair"), "steps": 3, "lr": 1e-3}
    run_pair("-m", TOY_FILE[:-3].replace("/", "."), json.dumps(options))
    alone = train.run(toy_config(data, tmp_path / "alone", steps=3))
    shared = json.loads((tmp_path / "pair" / "result.json").read_text())
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    one, two = tensors(tmp_path / "alone"), tensors(tmp_path / "pair")
    start = {name: p.detach() for name, p in fresh().named_parameters() if p.requires_grad}
    assert len(one) == len(two) == len(start)
    for name, value in one.items():
        assert_close(two[name], value, factor=10)


def test_accumulated_parts_are_drawn_like_one_batch(data, tmp_path):
    whole = toy_config(data, tmp_path / "a", batch_size=4, accumulate=2).resolved()
    model_batches = batches(data, 2)
    assert model_batches.numbers(0) + model_batches.numbers(1) == batches(data, 4).numbers(0)
    result = train.run(whole)
    assert result["pairs"] == 4 * 4


class Poisoned(Batches):
    """One step whose truth is not a number."""

    def __call__(self, step):
        batch = super().__call__(step)
        return batch._replace(truth=batch.truth * float("nan")) if step == 1 else batch


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(data, tmp_path):
    def trained(steps):
        model = fresh().train()
        source = Poisoned(batches(data).samples, 4)
        settings = TrainSettings(steps=steps, device="cpu", log_every=1)
        run = RunDirectory(tmp_path / str(steps))
        return model, fit(
            model, build_optimizer(model, 1e-3, 0.1), pair_loss, source, settings, run
        )

    (one, first), (two, second) = trained(1), trained(2)
    assert (first.skipped, second.skipped) == (0, 1)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("method", "files"),
    [
        ("none", ["lorat.safetensors"]),
        ("full", ["adapter.safetensors"]),
        ("dora+glad", ["adapter.safetensors"]),
        ("lora+lora-ga", ["adapter.safetensors", "lorat.safetensors"]),
        ("adalora(target=2)", ["adapter.safetensors"]),
    ],
)
def test_other_methods_starts_and_dynamics_train_in_place_of_lora(data, tmp_path, method, files):
    options = {"init_batches": 1} if "lora-ga" in method else {}
    result = train.run(toy_config(data, tmp_path / "run", method=method, steps=2, **options))
    assert result["files"] == files
    assert result["steps"] == 2
    head = sum(p.numel() for _, p in vl.trainable_parameters(fresh(None)))
    assert (result["trainable_parameters"] == head) == (method == "none")


def test_training_goes_on_from_a_trained_tracker(data, tmp_path):
    train.run(toy_config(data, tmp_path / "first", steps=2))
    weights = str(tmp_path / "first" / "adapter.safetensors")
    train.run(toy_config(data, tmp_path / "second", steps=1, weights=weights, lr=1e-12))
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for name, value in first.items():
        assert_close(second[name], value)


@pytest.mark.slow
def test_fixed_pairs_are_learnt_by_heart(data, tmp_path, monkeypatch):
    """A wrong crop, label or loss shows here: its pairs cannot be learnt."""
    monkeypatch.setattr(train, "MEASURED", 4)
    fixed = {"fixed_pairs": 4, "batch_size": 4, "weight_decay": 0.0, "adapter": {"rank": 16}}
    result = train.run(toy_config(data, tmp_path / "run", steps=220, lr=1e-2, **fixed))
    assert result["train_iou"] > 0.8


@pytest.mark.slow
@pytest.mark.data
def test_64_pairs_of_real_frames_are_learnt_by_heart(tracking_data, tmp_path, monkeypatch):
    """Adapters of rank 32 on a small frozen ViT of random weights."""
    wide = {"width": 128, "into": 512, "out_of": 512, "rank": 32, "backbone": "toy_vit_wide"}
    monkeypatch.setitem(VARIANTS, "toy", TOY.__class__(**{**vars(TOY), **wide}))
    monkeypatch.setattr(train, "MEASURED", 64)
    fixed = {"fixed_pairs": 64, "batch_size": 32, "weight_decay": 0.0}
    data = f"folder:{tracking_data}"
    result = train.run(toy_config(data, tmp_path / "run", steps=800, lr=5e-3, **fixed))
    assert result["train_iou"] > 0.8


def test_overlap_is_that_of_the_cell_with_the_highest_score(data):
    model = fresh()
    batch = batches(data)(0)
    prediction = predict(model, batch)
    best = prediction.score.flatten(1).argmax(dim=1)
    boxes = prediction.boxes.flatten(1, 2)[torch.arange(4), best]
    both = torch.stack([boxes, batch.truth])
    inside = (both[..., 2:].amin(0) - both[..., :2].amax(0)).clamp(min=0).prod(-1)
    areas = (both[..., 2:] - both[..., :2]).prod(-1).sum(0)
    assert_close(pair_overlap(model, batch), inside / (areas - inside))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["gotk10"]}, "unknown training data 'gotk10' .did you mean 'got10k'"),
        ({"tracker": "lorat-b-225"}, "unknown tracker 'lorat-b-225'"),
        ({"method": "lorra"}, "lorra"),
        ({"adapter": {"rnak": 3}}, "rnak"),
        ({"method": "none", "adapter": {"rank": 3}}, "--method is none"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"batch_size": 6, "accumulate": 4}, "--batch-size 6 cannot be divided into 4 parts"),
        ({"lr": -1.0}, "--lr must be positive, got -1.0"),
        ({"spread": -1.0}, "--spread must not be negative"),
        ({"reach": 0.0}, "--reach must be positive"),
        ({"third_augment": 1.5}, "--third-augment must lie in"),
        ({"data": []}, "--data names no data set"),
        ({"data_weights": [1.0, 2.0]}, "--data-weights: 2 numbers for 1 data sets"),
        ({"init_batches": 3}, "looks at no data"),
        ({"workers": -1}, "--workers must be at least 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"data": [f"folder:{tmp_path}"], **options})


def test_a_refused_run_leaves_no_folder(tmp_path, data):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to train on"):
        train.run(toy_config(f"folder:{tmp_path / 'empty'}", tmp_path / "run"))
    with pytest.raises(ConfigError, match="does not fit into 4 steps"):
        train.run(toy_config(data, tmp_path / "run2", warmup_steps=9))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run2" / "result.json").exists()


def test_the_papers_recipe_is_the_default():
    config = TrainConfig(tracker="lorat-b-224").resolved()
    assert config.steps == 170 * 1024
    assert config.warmup_steps == 2 * 1024
    assert config.checkpoint_every == 10 * 1024
    assert (config.lr, config.weight_decay, config.clip_norm) == (1e-4, 0.1, 1.0)
    assert config.data == ["lasot", "got10k_vot", "trackingnet", "coco"]
    assert config.method == "lorat"
