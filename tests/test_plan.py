"""The plan of a step without values is what the same step with values holds."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionlora as vl
from tests.saved import saved_bytes
from visionlora.errors import ConfigError
from visionlora.plan import LiveBytes, plan

WIDTH, BATCH = 48, 3


def vit(method="lora", **options):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=WIDTH, num_heads=3, depth=1, num_classes=5
    )
    model.requires_grad_(False)
    vl.inject(model, method, targets=["attn.qkv[q,k,v]", "mlp.fc1", "mlp.fc2"], **options)
    return model


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def examples(size=BATCH):
    return torch.randn(size, 3, 64, 64), torch.zeros(size, dtype=torch.long)


def measured(model, batch):
    """Return the bytes kept for backward and the peak of a step that is really done."""
    everything = [*model.parameters(), *model.buffers()]
    trained = [item for item in everything if item.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss_fn(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = saved_bytes(model, lambda: loss_fn(model, batch))
    state = [item for own in optimizer.state.values() for item in own.values()]
    with LiveBytes([*everything, *state]) as live:
        loss_fn(model, batch).backward()
        optimizer.step()
    return saved, live.peak


@pytest.mark.parametrize("method", ["lora", "lora-fa"])
def test_the_plan_is_what_a_step_with_values_holds(method):
    batch = examples()
    saved, peak = measured(vit(method), batch)
    made = plan(lambda: vit(method), loss_fn, batch)
    assert made.saved == saved
    assert made.peak == pytest.approx(peak, rel=0.01)


def test_the_constant_parts_are_the_parameters():
    made = plan(vit, loss_fn, examples())
    model = vit()
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    frozen = sum(item.numel() for item in model.parameters()) - trained
    assert (made.trained, made.frozen, made.gradients) == (4 * trained, 4 * frozen, 4 * trained)
    steps = sum(1 for item in model.parameters() if item.requires_grad)
    assert made.state == 8 * trained + 4 * steps  # two moments and a counter per tensor


def test_saved_bytes_grow_with_the_batch_and_weights_do_not():
    one, two = (plan(vit, loss_fn, examples(size)) for size in (2, 4))
    assert two.saved == pytest.approx(2 * one.saved, rel=1e-3)
    assert (two.frozen, two.trained, two.state) == (one.frozen, one.trained, one.state)


def test_frozen_weights_in_half_take_half():
    whole = plan(vit, loss_fn, examples(), precision="bf16")
    half = plan(vit, loss_fn, examples(), precision="bf16", frozen_dtype=torch.bfloat16)
    assert 2 * half.frozen == whole.frozen
    assert half.trained == whole.trained
    assert half.peak < whole.peak


def test_a_model_that_nothing_trains_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        plan(lambda: nn.Linear(2, 2).requires_grad_(False), loss_fn, examples())


def test_a_step_that_depends_on_values_is_refused():
    def by_value(model, batch):
        value = model(batch).sum()
        return value if value.item() > 0 else -value

    with pytest.raises(ConfigError, match="depends on values"):
        plan(lambda: nn.Linear(2, 2), by_value, torch.zeros(1, 2))
