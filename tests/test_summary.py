"""The report names what trains, and warns of what makes it slow."""

import torch
from torch import nn

import visionlora as vl


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)


def test_counts_are_those_of_the_tensors():
    model = Tower()
    total = sum(item.numel() for item in model.parameters())
    vl.inject(model, "lora", targets="blocks.2", rank=2)
    vl.freeze_base(model, train="head")
    report = vl.summary(model)
    assert report.total == total
    assert report.adapter_parameters == 2 * (8 + 8)
    assert report.trainable == 2 * (8 + 8) + 8 * 2 + 2
    assert report.sites == 1
    assert report.adapters == {"default": "lora"}
    assert report.active == ("default",)
    assert report.first_gradient == "blocks.2"
    assert report.warnings == ()
    assert "lora" in str(report)
    assert "blocks.2" in str(report)


def test_a_stray_token_in_front_is_named():
    model = vl.inject(Tower(), "lora", targets="blocks.2", rank=2)
    vl.freeze_base(model, train=("cls_token", "logit_scale", "head"))
    (warning,) = vl.summary(model).warnings
    assert "cls_token" in warning
    assert "logit_scale" not in warning
    assert "cls_token" in str(vl.summary(model))


def test_nothing_to_train_is_said():
    model = vl.inject(Tower(), "lora", targets="blocks.2", rank=2)
    vl.use(model, None)
    assert vl.summary(model).warnings
    assert "inactive" in str(vl.summary(model))


def test_a_model_without_adapters_has_a_summary():
    report = vl.summary(Tower())
    assert report.adapters == {}
    assert report.sites == 0
