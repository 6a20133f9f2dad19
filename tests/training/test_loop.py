"""What `fit` does around the steps: refusals before training, log, schedule, precision, tracker."""

import json
import math
import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.toy_training import toy_batches, toy_fit, toy_loss, toy_model, toy_optimizer
from visionlora.errors import ConfigError, NeverTrainedError, OutputError, VisionLoraError
from visionlora.training import RunDirectory, TrainSettings, fit


@contextmanager
def largest_file(size):
    """Let the system refuse to write files beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def never(index):
    raise AssertionError("training began")


def test_loss_falls_and_log_follows_the_schedule(tmp_path):
    result = toy_fit(toy_model(dropout=0.0), RunDirectory(tmp_path), steps=60, log_every=20)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert result.loss == log[-1]["loss"]
    progress = (59 - 2) / 58  # of the cosine after 2 warm-up steps, at the last step
    floor = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert log[-1]["lr"] == pytest.approx(floor, rel=1e-12)


def test_every_group_keeps_its_own_learning_rate(tmp_path):
    model = toy_model()
    optimizer = toy_optimizer(model)
    settings = TrainSettings(steps=2, device="cpu")
    run = RunDirectory(tmp_path)
    fit(model, optimizer, toy_loss, toy_batches(), settings, run, schedule=lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1.5e-2]


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(tmp_path):
    losses = [
        toy_fit(toy_model(), RunDirectory(tmp_path / name), steps=3, seed=seed).loss
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_callers_random_numbers_are_not_consumed(tmp_path):
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seeded():
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)

    seeded()
    expected = draw()
    model = toy_model()
    seeded()
    toy_fit(model, RunDirectory(tmp_path), steps=3)
    assert draw() == expected


def test_non_finite_steps_are_skipped_counted_and_logged(tmp_path):
    source = toy_batches()

    def batches(index):
        batch = source(index)
        if index == 4:  # step 2
            batch["targets"] = batch["targets"] * float("nan")
        return batch

    model = toy_model()
    result = toy_fit(model, RunDirectory(tmp_path), steps=6, log_every=1, batches=batches)
    assert result.skipped == 1
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1, 1, 1, 1]
    assert lines(tmp_path)[2]["loss"] is None
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_diverged_run_stops_with_a_reason(tmp_path):
    def batches(index):
        return {"inputs": torch.ones(4, 6), "targets": torch.full((4, 1), float("inf"))}

    with pytest.raises(VisionLoraError, match=r"diverged.* 3 skipped steps in a row \(step 3\)"):
        toy_fit(toy_model(), RunDirectory(tmp_path), batches=batches, max_skipped=3)


def test_a_trainable_tensor_outside_the_optimizer_is_refused(tmp_path):
    model = toy_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    settings = TrainSettings(steps=1, device="cpu")
    with pytest.raises(NeverTrainedError, match=r"4 trainable .* 1\.weight, 1\.bias, 4\.weight"):
        fit(model, optimizer, toy_loss, never, settings, RunDirectory(tmp_path))


def test_an_optimized_tensor_outside_the_model_is_refused(tmp_path):
    model = toy_model()
    optimizer = toy_optimizer(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    settings = TrainSettings(steps=1, device="cpu")
    with pytest.raises(ConfigError, match="1 tensors that are no parameters of the model"):
        fit(model, optimizer, toy_loss, never, settings, RunDirectory(tmp_path))


def test_a_checkpoint_that_will_not_fit_is_refused_before_training(tmp_path):
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = TrainSettings(steps=1, device="cpu", checkpoint_every=1)
    run = RunDirectory(tmp_path)
    with largest_file(1 << 17), pytest.raises(OutputError, match=r"cannot write \d+ bytes to"):
        fit(model, optimizer, toy_loss, never, settings, run)


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path):
    source = toy_batches()
    limits = []

    def batches(index):
        if index == 14 and not limits:
            limits.append(largest_file(1 << 11))
            limits[0].__enter__()
        return source(index)

    try:
        with pytest.raises(OutputError, match=r"cannot write .*step-00000008"):
            toy_fit(toy_model(), RunDirectory(tmp_path), batches=batches)
    finally:
        limits[0].__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    result = toy_fit(toy_model(), RunDirectory(tmp_path, resume=True))
    assert result.resumed_from == 4


def test_bf16_trains_and_leaves_the_model_as_it_was(tmp_path):
    model = toy_model(dropout=0.0)
    attributes = set(vars(model))
    seen = []
    model[4].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full = toy_fit(toy_model(dropout=0.0), RunDirectory(tmp_path / "fp32"), steps=20)
    half = toy_fit(model, RunDirectory(tmp_path / "bf16"), steps=20, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.loss != full.loss
    assert set(vars(model)) == attributes
    assert model(torch.zeros(2, 6)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is none of auto, cpu, cuda, cuda:N, mps"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": "cpu", "precision": "fp16"}, "fp16 needs a cuda device, got cpu"),
    ],
)
def test_a_machine_that_cannot_is_said_before_training(tmp_path, options, message):
    model = toy_model()
    settings = TrainSettings(steps=1, **options)
    with pytest.raises(ConfigError, match=message):
        fit(model, toy_optimizer(model), toy_loss, never, settings, RunDirectory(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "precision": "bf61"}, "did you mean 'bf16' or 'fp16'"),
        ({"steps": 1, "tracker": "tensorbord"}, r"did you mean 'tensorboard'\?"),
        ({"steps": 1, "clip_norm": 0.0}, "clip_norm must be positive or null"),
        ({"steps": 1, "keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**options)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    toy_fit(toy_model(), RunDirectory(tmp_path), steps=5, checkpoint_every=1, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_tensorboard_gets_the_figures(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy_fit(toy_model(), RunDirectory(tmp_path), steps=6, tracker="tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path)]
    assert points == expected


def test_nothing_is_printed_outside_a_terminal(tmp_path, capsys):
    toy_fit(toy_model(), RunDirectory(tmp_path))
    assert capsys.readouterr() == ("", "")
