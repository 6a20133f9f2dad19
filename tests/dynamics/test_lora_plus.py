"""LoRA+: B learns faster than A, everything else as before."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.lora_plus import LoRAPlusConfig
from visionlora.dynamics.lora_pro import LoRAProConfig
from visionlora.errors import ConfigError
from visionlora.groups import parameter_groups
from visionlora.ranks.optimizer import group_of, set_rates
from visionlora.ranks.structure import places_of

RATE, DECAY = 1e-2, 0.1


def model_of(method, head=False, **options):
    torch.default_generator.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    model = vl.inject(net, method, ["0"], **{"rank": 2, **options})
    model[2].requires_grad_(head)
    return model


def built(model, ratio=16.0, kind=torch.optim.AdamW):
    optimizer = kind(parameter_groups(model, RATE, DECAY))
    return optimizer, LoRAPlusConfig(ratio=ratio).build(model, optimizer, 10)


def delta_of(model):
    return places_of(model)[0].delta


def inputs():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("method", ["lora", "dora", "block-lora", "slora"])
def test_up_and_vectors_are_faster_and_only_matrices_decay(method):
    model = model_of(method, head=True)
    optimizer, _ = built(model)
    for name, parameter in delta_of(model).named_parameters():
        group = group_of(optimizer, parameter)
        fast = name in ("B", "magnitude")
        assert group["lr"] == pytest.approx(RATE * (16 if fast else 1)), name
        assert group["weight_decay"] == (0.0 if name == "magnitude" else DECAY), name
    for parameter in model[2].parameters():
        group = group_of(optimizer, parameter)
        assert (group["lr"], group["weight_decay"]) == (RATE, DECAY)


def test_every_parameter_is_in_one_group():
    model = model_of("dora", head=True)
    optimizer, _ = built(model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_descent_moves_up_by_the_ratio_and_down_as_before():
    plain, plus = model_of("lora"), model_of("lora")
    steps = []
    for model, ratio in ((plain, 1.0), (plus, 4.0)):
        torch.nn.init.ones_(delta_of(model).B)
        before = copy.deepcopy(delta_of(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        dynamics = LoRAPlusConfig(ratio=ratio).build(model, optimizer, 1)
        stepper = Stepper(model, optimizer, dynamics=[dynamics])
        stepper.step([inputs()], lambda x, model=model: model(x).square().mean())
        after = delta_of(model)
        steps.append([(after.A - before.A).detach(), (after.B - before.B).detach()])
    assert_close(steps[1][0], steps[0][0])
    assert_close(steps[1][1], 4.0 * steps[0][1])


def test_schedule_multiplies_both_rates():
    model = model_of("lora")
    optimizer, _ = built(model)
    set_rates(optimizer, 0, 0.5)
    rates = [group_of(optimizer, item)["lr"] for item in (delta_of(model).A, delta_of(model).B)]
    assert rates == pytest.approx([RATE / 2, 8 * RATE])


def test_groups_of_different_rates_keep_their_relation():
    """A run may give one layer a rate of its own."""
    torch.default_generator.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    model = vl.inject(net, "lora", ["0", "1"], rank=2)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(place.delta.parameters()), "lr": rate}
            for place, rate in zip(places_of(model), (1e-2, 1e-3), strict=True)
        ]
    )
    LoRAPlusConfig().build(model, optimizer, 1)
    for place, rate in zip(places_of(model), (1e-2, 1e-3), strict=True):
        assert group_of(optimizer, place.delta.A)["lr"] == pytest.approx(rate)
        assert group_of(optimizer, place.delta.B)["lr"] == pytest.approx(16 * rate)


def test_pair_of_an_embedding_stays_as_it_is():
    torch.default_generator.manual_seed(0)
    model = vl.inject(nn.Sequential(nn.Embedding(9, 6)), "lora", ["0"], rank=2)
    optimizer, _ = built(model)
    assert [group["lr"] for group in optimizer.param_groups] == [RATE]


@pytest.mark.parametrize("method", ["lora-fa", "lora-xs", "hira", "full"])
def test_methods_without_two_trained_factors_are_refused(method):
    options = {} if method == "full" else {"rank": 2}
    torch.default_generator.manual_seed(0)
    model = vl.inject(nn.Sequential(nn.Linear(6, 7)), method, ["0"], **options)
    with pytest.raises(ConfigError, match="both must train"):
        built(model)


def test_nothing_to_train_is_refused():
    model = model_of("lora", head=True)
    delta_of(model).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to do"):
        built(model)


def test_ratio_and_lora_pro_are_refused():
    with pytest.raises(ConfigError, match="ratio must be positive"):
        LoRAPlusConfig(ratio=0.0)
    with pytest.raises(ConfigError, match="lora-pro"):
        LoRAPlusConfig().check(delta_of(model_of("lora")).config, [LoRAProConfig()])
