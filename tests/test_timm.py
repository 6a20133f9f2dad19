"""The ten lines of a timm user, for the families that differ in how they use their weights."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visionlora as vl
from tests.tolerances import assert_close

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
FAMILIES = {
    "vit": ("vit_base_patch16_224", {**SMALL, "img_size": 32}, "attn.qkv[q,v]"),
    "vit-all": (
        "vit_base_patch16_224",
        {**SMALL, "img_size": 32},
        ["blocks.*", "patch_embed.proj"],
    ),
    "convnext": (
        "convnext_tiny",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        ["mlp.fc*", "conv_dw"],
    ),
    "resnet": (
        "resnet50",
        {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8},
        ["layer?.*.conv?"],
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)},
        ["attn.qkv[q,v]", "mlp.fc1"],
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)},
        ["attn.qkv[q,k,v]", "mlp.fc1"],
    ),
    "beit": ("beit_base_patch16_224", {**SMALL, "img_size": 32}, ["attn.qkv[q,v]", "attn.proj"]),
    "eva": ("eva02_base_patch14_224", {**SMALL, "img_size": 28}, ["attn.q_proj", "attn.v_proj"]),
    "eva-fused": ("eva_giant_patch14_224", {**SMALL, "img_size": 28}, ["attn.qkv[q,v]"]),
}


def build(family):
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    # Some families start with branches at zero, which pass no gradient.
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and not bool(weight.any()):
            torch.nn.init.ones_(weight)
    return model


def run(family, tmp_path, steps=2):
    size = FAMILIES[family][1].get("img_size", 32)
    model = build(family)
    keys = list(model.state_dict())
    x, y = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    base = model.eval()(x).detach()
    vl.inject(model, "lora", targets=FAMILIES[family][2], rank=2)
    assert_close(model(x), base)
    trained = dict(vl.trainable_parameters(model))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    reached = set()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        reached |= {name for name, item in trained.items() if bool(item.grad.abs().sum() > 0)}
        optimizer.step()
    assert reached == set(trained)

    output = model.eval()(x)
    assert not torch.allclose(output, base)
    path = vl.save(model, tmp_path / "adapter.safetensors")
    fresh = vl.load(build(family), path).eval()
    assert torch.equal(fresh(x), output)
    vl.merge(fresh)
    assert_close(fresh(x), output, factor=10)
    vl.eject(fresh)
    vl.eject(model)
    for restored in (fresh, model):
        assert torch.equal(restored.eval()(x), base)
        assert list(restored.state_dict()) == keys


@pytest.mark.parametrize("family", FAMILIES)
def test_inject_train_save_load_merge_eject(family, tmp_path):
    run(family, tmp_path)


def test_batch_statistics_that_training_changed_survive_the_file(tmp_path):
    model = vl.inject(build("resnet"), "lora", targets="layer1.*.conv?", rank=2).train()
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32) + 2)
    path = vl.save(model, tmp_path / "a.safetensors")
    fresh = vl.load(build("resnet"), path)
    one, two = dict(model.named_buffers()), dict(fresh.named_buffers())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["bn1.running_mean"], build("resnet").bn1.running_mean)


@pytest.mark.slow
def test_the_real_vit(tmp_path):
    FAMILIES["real"] = ("vit_base_patch16_224", {"img_size": 224}, "attn.qkv[q,v]")
    try:
        run("real", tmp_path)
    finally:
        del FAMILIES["real"]
