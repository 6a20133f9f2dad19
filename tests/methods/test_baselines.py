"""Full, bitfit and norm train exactly what plain training of those tensors would."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, TargetError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(4)
        self.rms = nn.RMSNorm(4)
        self.fc = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2, bias=False)

    def forward(self, x):
        x = self.group(self.batch(self.conv(x))).mean((2, 3))
        return self.last(torch.tanh(self.fc(self.rms(self.layer(x)))))


NORMS = ["batch", "group", "layer", "rms"]


def train(model, parameters, steps=4):
    torch.manual_seed(0)
    x, goal = torch.randn(6, 3, 5, 5).double(), torch.randn(6, 2).double()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("method", "options", "targets", "trained"),
    [
        ("full", {}, ["conv", "fc", "last"], ["conv.weight", "fc.weight", "last.weight"]),
        (
            "full",
            {"bias": True},
            ["conv", "fc", "last"],
            ["conv.weight", "conv.bias", "fc.weight", "fc.bias", "last.weight"],
        ),
        (
            "bitfit",
            {},
            ["conv", "fc", "batch", "group", "layer"],
            ["conv.bias", "fc.bias", "batch.bias", "group.bias", "layer.bias"],
        ),
        (
            "norm",
            {},
            NORMS,
            [*(f"{name}.weight" for name in NORMS), "batch.bias", "group.bias", "layer.bias"],
        ),
    ],
)
def test_it_is_plain_training_of_those_tensors(method, options, targets, trained):
    torch.manual_seed(1)
    plain = Net().double()
    adapted = vl.inject(copy.deepcopy(plain), method, targets=targets, **options)
    before = {name: item.clone() for name, item in plain.named_parameters()}
    names = dict(plain.named_parameters())
    count = sum(names[name].numel() for name in trained)
    assert count == sum(item.numel() for _, item in vl.trainable_parameters(adapted))
    train(plain, [names[name] for name in trained])
    train(adapted, [item for _, item in vl.trainable_parameters(adapted)])
    vl.eject(adapted, merge=True)
    for name, item in adapted.named_parameters():
        assert_close(item, names[name])
        assert torch.equal(item, before[name]) is (name not in trained), name


def test_bitfit_trains_the_bias_of_a_slice_only():
    model = nn.Sequential(nn.Linear(4, 12)).double()
    bias = model[0].bias.detach().clone()
    vl.inject(model, "bitfit", targets="0[q,v]")
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.fill_(1.0)
    vl.eject(model, merge=True)
    expected = torch.ones(12, dtype=torch.float64)
    expected[4:8] = 0
    assert_close(model[0].bias, bias + expected)


def test_what_a_baseline_cannot_serve_is_refused():
    with pytest.raises(ConfigError, match=r"last.*no bias"):
        vl.inject(Net(), "bitfit", targets="last")
    with pytest.raises(ConfigError, match=r"rms.*no bias"):
        vl.inject(Net(), "bitfit", targets="rms")
    with pytest.raises((ConfigError, TargetError), match="Embedding"):
        vl.inject(nn.Sequential(nn.Embedding(4, 2)), "bitfit", targets="0")
    with pytest.raises((ConfigError, TargetError), match="Linear"):
        vl.inject(Net(), "norm", targets="fc")
    with pytest.raises((ConfigError, TargetError), match="LayerNorm"):
        vl.inject(Net(), "full", targets="layer")
