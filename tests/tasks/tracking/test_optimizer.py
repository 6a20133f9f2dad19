"""Which tensors decay, and the learning rate of every step."""

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

import visionlora as vl
from tasks.tracking.training.optimizer import build_optimizer, prefixed_cosine
from tests.tasks.tracking.lorats import tracker
from visionlora.errors import ConfigError


def decays(model):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, 1e-3, 0.1)
    found = {
        names[id(p)]: group["weight_decay"]
        for g in [optimizer]
        for group in g.param_groups
        for p in group["params"]
    }
    return optimizer, found


def test_types_biases_and_single_rows_do_not_decay():
    model = tracker()
    optimizer, found = decays(model)
    assert set(found) == {name for name, _ in vl.trainable_parameters(model)}
    for name, decay in found.items():
        last_score_layer = name.startswith("head.") and model.get_parameter(name).shape[0] == 1
        none = "embedding" in name or name.endswith("bias") or last_score_layer
        assert decay == (0.0 if none else 0.1), name
    assert sum(decay == 0 for decay in found.values()) == 1 + 6 + 1
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_what_a_method_declares_about_its_tensors_stays():
    model = tracker("dora(rank=2)")
    declared = {
        id(p): group for group in vl.parameter_groups(model, 1e-3, 0.1) for p in group["params"]
    }
    optimizer, _ = decays(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == declared[id(parameter)]["lr"]
            assert group["weight_decay"] in (0.0, declared[id(parameter)]["weight_decay"])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (40, 0), (7, 3)])
def test_the_schedule_is_timms_prefixed_cosine(steps, warmup):
    lr = 1e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    reference = CosineLRScheduler(
        optimizer,
        steps,
        lr_min=1e-6,
        warmup_t=warmup,
        warmup_lr_init=1e-7,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    schedule = prefixed_cosine(steps, warmup=warmup, start=1e-3, floor=1e-2)
    for step in range(steps):
        reference.step_update(step)
        assert schedule(step) * lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 10, "start": 0.0, "floor": 0.0}, "does not fit into 10 steps"),
        ({"warmup": 1, "start": 2.0, "floor": 0.0}, "between 0 and 1"),
        ({"warmup": 1, "start": 0.0, "floor": -1.0}, "between 0 and 1"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        prefixed_cosine(10, **values)
