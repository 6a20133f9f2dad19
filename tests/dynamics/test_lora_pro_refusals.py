"""LoRA-Pro: what it cannot train, and with what."""

import pytest
import torch

import visionlora as vl
from tests.dynamics.pairs import adapted, network, train, trained, trainer
from visionlora.dynamics.lora_plus import LoRAPlusConfig
from visionlora.dynamics.lora_pro import LoRAProConfig
from visionlora.dynamics.sam import SAMConfig
from visionlora.errors import ConfigError, VisionLoraError


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dora", {"rank": 2}, "cannot train dora"),
        ("slora", {"rank": 2}, "cannot train slora"),
        ("lora-fa", {"rank": 2}, "'projected'"),
        ("lora-xs", {"rank": 2}, "'projected'"),
        ("full", {}, "cannot train full"),
        ("lora", {"rank": 2, "dropout": 0.1}, "dropout=0"),
        ("lora", {"rank": 2, "alpha": 0.0}, "divides by the scale"),
        ("block-lora", {"layout": "grid", "dropout": 0.0}, "layout 'grid'"),
    ],
)
def test_methods_without_a_free_linear_pair_are_refused(method, options, reason):
    targets = "first" if method == "block-lora" else ["first", "last"]
    model = vl.inject(network(), method, targets, **options)
    with pytest.raises(ConfigError, match=reason):
        trainer(model, LoRAProConfig())


@pytest.mark.parametrize(
    ("other", "reason"),
    [(LoRAPlusConfig(), "another rate for B"), (SAMConfig(), "at another point")],
)
def test_dynamics_that_change_the_gradient_are_refused(other, reason):
    config = adapted(rank=2).first.adapters.default["weight"].config
    with pytest.raises(ConfigError, match=reason):
        LoRAProConfig().check(config, [other])


def test_factors_of_different_rates_are_refused():
    model = adapted(rank=2)
    groups = [{"params": [p], "lr": 0.1 * (1 + i)} for i, p in enumerate(trained(model))]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(ConfigError, match="one learning rate"):
        LoRAProConfig().build(model, optimizer, 1)


@pytest.mark.parametrize(
    "options",
    [{"beta1": 1.0}, {"eps": -1.0}, {"ridge": -1.0}, {"warm_b_steps": -1}, {"choice": "x"}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="lora-pro"):
        LoRAProConfig(**options)


def test_a_state_of_another_model_is_refused():
    saved = train(adapted(rank=2), LoRAProConfig(), steps=1).state_dict()
    only = vl.inject(network(), "lora", "last", rank=2)
    with pytest.raises(VisionLoraError, match="another model"):
        trainer(only, LoRAProConfig()).load_state_dict(saved)
