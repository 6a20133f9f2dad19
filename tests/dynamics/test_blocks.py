"""Blocks are found in the names of real models, one list per model, and nothing else is."""

import pytest
import timm
import torch

import visionlora as vl
from visionlora.dynamics.blocks import blocks_of, layer_of


def names_of(model):
    with torch.device("meta"):
        return [name for name, _ in timm.create_model(model).named_parameters()]


@pytest.mark.parametrize(
    ("model", "count", "some", "outside"),
    [
        (
            "vit_tiny_patch16_224",
            12,
            "blocks.11",
            {"cls_token", "pos_embed", "patch_embed.proj", "norm", "head"},
        ),
        ("swin_tiny_patch4_window7_224", 12, "layers.2.blocks.5", {"patch_embed", "layers.1"}),
        ("convnext_atto", 12, "stages.2.blocks.5", {"stem", "stages.1.downsample", "head"}),
        ("resnet18", 8, "layer4.1", {"conv1", "bn1", "fc"}),
        ("efficientnet_b0", 16, "blocks.1.0", {"conv_stem", "conv_head", "classifier"}),
        ("beitv2_base_patch16_224", 12, "blocks.0", {"patch_embed", "head", "fc_norm"}),
    ],
)
def test_the_blocks_of_image_models_are_found(model, count, some, outside):
    names = names_of(model)
    blocks = blocks_of(names)
    assert len(blocks) == count
    assert some in blocks
    for block, own in blocks.items():
        assert own == [name for name in names if name.startswith(f"{block}.")]
    within = {name for own in blocks.values() for name in own}
    rest = [name for name in names if name not in within]
    for part in outside:
        assert any(name == part or name.startswith(f"{part}.") for name in rest), part


def test_the_towers_of_a_pair_of_encoders_are_one_list():
    names = [
        "visual.conv1.weight",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.1.mlp.c_fc.weight",
        "transformer.resblocks.0.ln_1.weight",
        "token_embedding.weight",
        "text.encoder.layer.0.output.dense.weight",
        "ln_final.weight",
        "logit_scale",
    ]
    assert list(blocks_of(names)) == [
        "visual.transformer.resblocks.0",
        "visual.transformer.resblocks.1",
        "transformer.resblocks.0",
        "text.encoder.layer.0",
    ]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.3.mlp.layers.0.weight", "layers.3"),
        ("blocks.3.mlp.layers.0.weight", "blocks.3"),
        ("blocks.2.0.weight", "blocks.2"),  # a leaf layer of a Sequential
        ("blocks.2.0.conv.weight", "blocks.2.0"),
        ("blocks.2.weight", "blocks.2"),
        ("stages.1.blocks.2.gamma", "stages.1.blocks.2"),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", "encoder.layers.encoder_layer_3"),
        ("h.7.attn.c_attn.weight", "h.7"),
    ],
)
def test_the_block_of_a_name(name, block):
    assert blocks_of([name]) == {block: [name]}


@pytest.mark.parametrize("name", ["head.weight", "blocks.norm.weight", "myblocks.3.a.weight"])
def test_what_is_in_no_block_is_left_out(name):
    assert blocks_of([name]) == {}


def test_adapters_are_where_their_layers_are():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    vl.inject(model, "full", ["attn.qkv[q,v]", "mlp.fc1", "head"])
    names = [name for name, _ in vl.trainable_parameters(model)]
    blocks = blocks_of(names)
    assert {block: len(own) for block, own in blocks.items()} == {"blocks.0": 3, "blocks.1": 3}
    assert {layer_of(name) for name in blocks["blocks.1"]} == {
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
    }
    assert layer_of("head.adapters.default.weight.D") == "head"
