"""Bytes kept for backward: counted exactly, against the frozen model.

The floor is the same model, frozen, with a gradient that passes through it from the input on: it
keeps what attention, norms and activations need, and no input of a linear layer.
"""

import pytest
import timm
import torch
from torch import nn

import visionlora as vl
from tests.saved import saved_bytes

WIDTH, TOKENS = 96, 50


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_base_patch16_224",
        img_size=112,
        embed_dim=WIDTH,
        num_heads=6,
        depth=2,
        num_classes=0,
    ).eval()


ALL = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
INPUTS = {"attn.qkv": WIDTH, "attn.proj": WIDTH, "mlp.fc1": WIDTH, "mlp.fc2": 4 * WIDTH}


def floats_beyond_the_floor(method, targets=ALL, **options):
    """Return how many floats a token costs in one block, beyond those of the frozen block."""
    block = vit().blocks[0].requires_grad_(False)
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    floor = saved_bytes(block, lambda: block(x))
    vl.inject(block, method, targets=list(targets), **options)
    return (saved_bytes(block, lambda: block(x)) - floor) / (2 * TOKENS * 4)


def test_lora_on_the_real_widths_stays_within_the_budget():
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=2, num_classes=100)
    model.requires_grad_(False)
    model.cls_token.requires_grad_(True)  # the floor: gradients flow to the first block's input
    x = torch.randn(1, 3, 224, 224)
    floor = saved_bytes(model, lambda: model(x))
    ratios = {}
    for method in ("lora", "lora-fa", "block-lora"):
        options = {"layout": "grid", "dropout": 0.0} if method == "block-lora" else {}
        vl.inject(model, method, targets=list(ALL), rank=8, **options)
        ratios[method] = saved_bytes(model, lambda: model(x)) / floor
        vl.eject(model)
    assert ratios["lora"] <= 1.56
    assert ratios["lora-fa"] <= 1.02
    assert ratios["block-lora"] <= 1.36
    vl.inject(model, "lora", targets=list(ALL), rank=8, lean=True)
    assert saved_bytes(model, lambda: model(x)) / floor <= 1.01


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_keeps_each_input_once_and_what_attention_keeps_not_again(rank):
    inputs = sum(INPUTS.values()) - INPUTS["attn.proj"]  # the attention output is kept anyway
    assert floats_beyond_the_floor("lora", rank=rank) == inputs + 4 * rank


@pytest.mark.parametrize("rank", [1, 4])
def test_a_frozen_down_projection_keeps_no_input(rank):
    assert floats_beyond_the_floor("lora-fa", rank=rank) == 4 * rank


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_grid_layout_keeps_a_fraction_of_the_input(blocks):
    options = {"rank": 2, "dropout": 0.0, "layout": "grid", "blocks": blocks}
    expected = sum(INPUTS.values()) / blocks + 4 * 2
    assert floats_beyond_the_floor("block-lora", **options) == expected


LEAN = {
    "lora": ({"rank": 4}, 4 * 4),
    "hira": ({"rank": 4}, 0),
    "full": ({}, 0),
    # the attention's output in two slices that are added
    "block-lora": ({"rank": 2, "dropout": 0.0, "layout": "grid", "blocks": 2}, WIDTH / 2 + 4 * 2),
}


@pytest.mark.parametrize("method", LEAN)
def test_lean_adapters_keep_no_input_at_all(method):
    options, expected = LEAN[method]
    assert floats_beyond_the_floor(method, lean=True, **options) == expected


def test_lean_slices_keep_their_hidden_tensors_alone():
    assert floats_beyond_the_floor("lora", ["attn.qkv[q,v]", "mlp.fc2"], rank=3, lean=True) == 9


def test_lean_layers_without_a_gradient_before_them_keep_their_input_once():
    block = vit().blocks[0]
    x = torch.randn(2, TOKENS, WIDTH)
    kept = []
    for lean in (False, True):
        vl.inject(block, "lora", list(ALL), rank=2, lean=lean)
        kept.append(saved_bytes(block, lambda: block(x)))
        vl.eject(block)
    # the norm before q, k, v keeps nothing here, so that input stays
    assert kept[0] - kept[1] == 4 * x[..., 0].numel() * (WIDTH + 4 * WIDTH)


def test_slices_of_a_projection_share_one_input():
    one = floats_beyond_the_floor("lora", targets=["attn.qkv[q]"], rank=3)
    three = floats_beyond_the_floor("lora", targets=["attn.qkv[q,k,v]"], rank=3)
    assert (one, three) == (WIDTH + 3, WIDTH + 9)


def test_adapters_in_the_last_block_keep_nothing_of_the_first():
    blocks = nn.Sequential(*vit().blocks).requires_grad_(False)
    x = torch.randn(2, TOKENS, WIDTH)
    vl.inject(blocks, "lora", targets=["1.attn.qkv", "1.mlp.fc1"], rank=2)
    last = saved_bytes(blocks, lambda: blocks(x))
    vl.eject(blocks)
    vl.inject(blocks, "lora", targets=["0.attn.qkv", "1.attn.qkv", "1.mlp.fc1"], rank=2)
    assert last < 0.6 * saved_bytes(blocks, lambda: blocks(x))


def test_evaluation_without_gradients_keeps_nothing():
    blocks = nn.Sequential(*vit().blocks).requires_grad_(False)
    vl.inject(blocks, "lora", targets="attn.qkv", rank=2)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.no_grad(), hooks:
        blocks(torch.randn(2, TOKENS, WIDTH))
    assert not kept
