"""What each method says of itself, in numbers of its own."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import ConfigError


def layer(method, out=12, width=16, targets="0", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out)).double()
    return vl.inject(model, method, targets=targets, **options)


def delta_of(model):
    return model[0].adapters["default"]["weight"]


@torch.no_grad()
def disturb(model):
    for _, item in vl.trainable_parameters(model):
        item.add_(torch.randn_like(item))
    return model


def change(model):
    return delta_of(model).delta(model[0].weight).detach()


@pytest.mark.parametrize(("scaling", "factor"), [("standard", 6 / 4), ("rslora", 6 / 2)])
def test_lora_is_the_scaled_product(scaling, factor):
    model = disturb(layer("lora", rank=4, alpha=6.0, scaling=scaling))
    delta = delta_of(model)
    assert_close(change(model), factor * delta.B @ delta.A)
    assert int(torch.linalg.matrix_rank(change(model))) == 4


def test_the_default_scale_is_one():
    assert delta_of(layer("lora", rank=4)).scale == 1.0
    assert delta_of(layer("rslora", rank=4)).scale == 2.0


def test_the_normal_pair_is_small_and_not_zero():
    delta = delta_of(layer("lorat", rank=12, out=64, width=64))
    for item in (delta.A, delta.B):
        assert abs(float(item.detach().std()) - 0.02) < 0.003
    assert bool((delta.B @ delta.A).any())


def test_lora_fa_trains_half_of_lora_and_starts_like_it():
    one, other = layer("lora-fa", rank=2), layer("lora", rank=2)
    assert torch.equal(delta_of(one).A, delta_of(other).A)
    assert [name.split(".")[-1] for name, _ in vl.trainable_parameters(one)] == ["B"]


def test_dora_keeps_its_row_norms_at_the_magnitude():
    model = disturb(layer("dora", rank=2))
    weight = model[0].weight + change(model)
    assert_close(weight.norm(dim=1), delta_of(model).magnitude.abs())


def test_dora_row_norms_without_the_matrix():
    model = disturb(layer("dora", rank=2, alpha=5.0))
    delta = delta_of(model)
    direction = model[0].weight + delta.scale * delta.B @ delta.A
    assert_close(delta.row_norms(model[0].weight, delta.A, delta.B), direction.norm(dim=1))


def test_vera_shares_one_pair_over_all_shapes():
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    vl.inject(model, "vera", targets=["0", "1"], rank=5)
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 2 * 5 + 10 + 4
    bases = model.visionlora_shared["default"]
    assert bases.A.shape == (5, 10)
    assert bases.B.shape == (10, 5)
    assert not list(bases.parameters())
    one, two = (model[i].adapters["default"]["weight"].factors() for i in (0, 1))
    assert torch.equal(one[1], 0.1 * bases.A[:, :6])
    assert torch.equal(two[1], 0.1 * bases.A)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_block_lora_counts(blocks):
    for layout in ("rank", "grid"):
        model = layer("block-lora", rank=4, blocks=blocks, layout=layout)
        count = sum(item.numel() for _, item in vl.trainable_parameters(model))
        assert count == 4 * 16 // blocks + 4 * 12


@pytest.mark.parametrize("layout", ["rank", "grid"])
def test_one_block_is_lora(layout):
    options = {"rank": 4, "alpha": 3.0, "scaling": "rslora", "dropout": 0.0}
    block = disturb(layer("block-lora", blocks=1, layout=layout, **options))
    plain = layer("lora", **options)
    delta_of(plain).load_state_dict(delta_of(block).state_dict())
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(block(x), plain(x))


def test_block_lora_ranks():
    rank = disturb(layer("block-lora", rank=4, blocks=2, layout="rank"))
    grid = disturb(layer("block-lora", rank=4, blocks=2, layout="grid"))
    assert int(torch.linalg.matrix_rank(change(rank))) == 2
    assert int(torch.linalg.matrix_rank(change(grid))) == 4


def test_the_grid_layout_adds_input_slices_and_the_rank_layout_does_not():
    x = torch.randn(3, 16, dtype=torch.float64)
    swapped = torch.cat([x[:, 8:], x[:, :8]], 1)
    for layout, same in (("grid", True), ("rank", False)):
        difference = change(disturb(layer("block-lora", rank=4, blocks=2, layout=layout)))
        assert torch.allclose(x @ difference.t(), swapped @ difference.t()) is same


def train(model, groups, steps=20):
    torch.manual_seed(3)
    x, goal = torch.randn(20, 16).double(), torch.randn(20, 12).double()
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
    return change(model)


def test_arms_stay_equal_and_train_as_lora_with_a_faster_up_matrix():
    blocks, rate, decay = 2, 1e-2, 0.1
    options = {"alpha": 1.0, "dropout": 0.0}
    block = layer("block-lora", rank=4, blocks=blocks, **options)
    found = train(block, [{"params": block.parameters(), "lr": rate, "weight_decay": decay}])
    arms = delta_of(block).B.detach().unflatten(1, (blocks, -1))
    assert bool(arms.any())
    assert torch.equal(arms[:, 0], arms[:, 1])
    # LoRA of rank r / n with the scale of the nominal rank: alpha / sqrt(r) = alpha' / (r / n)
    plain = layer("lora", rank=2, alpha=1.0 / 4**0.5 * 2)
    with torch.no_grad():
        delta_of(plain).A.copy_(delta_of(layer("block-lora", rank=4, blocks=blocks, **options)).A)
    delta = delta_of(plain)
    groups = [
        {"params": [delta.A], "lr": rate, "weight_decay": decay},
        {"params": [delta.B], "lr": blocks * rate, "weight_decay": decay / blocks},
    ]
    torch.testing.assert_close(found, train(plain, groups), atol=1e-6, rtol=1e-5)


def test_blocks_must_divide():
    with pytest.raises(ConfigError, match="3 blocks"):
        layer("block-lora", rank=4, blocks=3)
    with pytest.raises(ConfigError, match=r"3 blocks.*16 input"):
        layer("block-lora", rank=3, blocks=3, layout="grid")


def test_a_rank_that_a_site_cannot_have_is_refused():
    for method in ("lora", "lora-fa", "dora", "block-lora"):
        with pytest.raises(ConfigError, match=r"rank 14.*12 x 16.*at most 12"):
            layer(method, rank=14)
