"""What `--params` means in towers of every make."""

import pytest
import timm
import torch
from torch import nn

import visionlora as vl
from tasks.fewshot import towers
from visionlora.errors import ConfigError


@pytest.fixture
def build():
    """Return `build(name)`: a timm model without memory."""

    def create(name: str) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)

    return create


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_vit", "q k v out mlp conv linear"),
        ("eva02_tiny_patch14_224", "q k v out mlp conv linear"),
        ("fastvit_mci0", "q k v out mlp conv linear"),
        ("swin_tiny_patch4_window7_224", "q k v out mlp conv linear"),
        ("pvt_v2_b0", "q k v out mlp conv linear"),
        ("convnext_tiny", "mlp conv linear"),
        ("tf_efficientnet_lite0", "conv"),
    ],
)
def test_words_of_a_tower(build, name, words):
    assert towers.available(build(name)) == words.split()


def test_fused_separate_and_half_fused_projections_are_found(build):
    found = towers.timm_targets(build("test_vit"), "", ["q", "v"])
    assert found[:2] == ["blocks.0.attn.qkv[q]", "blocks.1.attn.qkv[q]"]
    assert "blocks.0.attn.qkv[v]" in found
    found = towers.timm_targets(build("eva02_base_patch16_clip_224"), "visual.trunk.", ["k", "out"])
    assert found[0] == "visual.trunk.blocks.0.attn.k_proj"
    assert found[-1] == "visual.trunk.blocks.11.attn.proj"
    found = towers.timm_targets(build("pvt_v2_b0"), "", ["q", "k"])
    assert {"stages.0.blocks.0.attn.q", "stages.0.blocks.0.attn.kv[k]"} <= set(found)


@pytest.mark.parametrize("name", ["test_vit", "fastvit_mci0", "tf_efficientnet_lite0", "resnet18"])
def test_all_layers_that_are_named_can_carry_an_adapter(build, name):
    tower = build(name)
    for word in towers.available(tower):
        names = towers.timm_targets(tower, "", [word])
        matches = vl.targets.find_targets(tower, names)
        assert {match.name for match in matches} == {item.partition("[")[0] for item in names}


def test_attention_that_pools_is_left_alone(build):
    found = towers.timm_targets(build("vit_base_patch16_siglip_224"), "", ["q", "out", "mlp"])
    assert len(found) == 12 * 4
    assert not any("pool" in name for name in found)


def test_every_convolution_is_meant_by_conv(build):
    tower = build("resnet18")
    found = towers.timm_targets(tower, "", ["conv"])
    assert len(found) == sum(isinstance(item, nn.Conv2d) for item in tower.modules())


def test_what_a_tower_lacks_is_said_with_what_it_has(build):
    with pytest.raises(ConfigError, match=r"--params q: this vision tower has only conv; or x"):
        towers.timm_targets(build("tf_efficientnet_lite0"), "", ["q"], "; or x")


@pytest.mark.parametrize(("params", "message"), [(["qkv"], "unknown"), ([], "at least one")])
def test_unknown_words_are_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        towers.checked(params)
