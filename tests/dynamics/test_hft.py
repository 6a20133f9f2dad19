"""Half Fine-Tuning: which half of a block trains, by category, and that the rest stays."""

import pytest
import timm
import torch

import visionlora as vl
from tests.dynamics.towers_in_blocks import batches, loss, moved, tower, values
from tests.training.toy_training import exact
from visionlora.dynamics import Stepper
from visionlora.dynamics.hft import HFTConfig, category, units_of
from visionlora.dynamics.lisa import LISAConfig
from visionlora.errors import ConfigError
from visionlora.registry import build_config
from visionlora.training import RunDirectory, TrainSettings, fit

LEAVES = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.proj"}


def adamw(model):
    parameters = [item for _, item in vl.trainable_parameters(model)]
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def setup(model=None, **options):
    model = tower() if model is None else model
    optimizer = adamw(model)
    hft = HFTConfig(**options).build(model, optimizer, 100)
    return model, optimizer, hft, Stepper(model, optimizer, dynamics=[hft])


def train(stepper, steps, start=0):
    for step in range(start, start + steps):
        stepper.step([batches(step)], lambda batch: loss(stepper.model, batch))


def test_half_of_every_category_of_every_block_trains():
    _, _, hft, _ = setup()
    for seed in range(5):
        hft.generator.manual_seed(seed)
        active = hft.draw()
        for index in range(4):
            own = {u.removeprefix(f"blocks.{index}.") for u in active if f"blocks.{index}." in u}
            assert len(own & set(LEAVES.values())) == 2
            assert len(own & {"mlp.fc1", "mlp.fc2"}) == 1
            assert len(own & {"norm1", "norm2"}) == 1
            assert len(own) == 4


@pytest.mark.parametrize("seed", range(4))
def test_a_vision_transformer_trains_exactly_half_of_its_matrices(seed):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", depth=3, num_classes=10)
        vl.inject(model, "full", ["attn.qkv[q,k,v]", "attn.proj", "mlp.fc1", "mlp.fc2"])
    hft = HFTConfig(seed=seed).build(model, adamw(model), 10)
    d = 384
    for block in range(3):
        sizes = {"attention": 0, "matrix": 0}
        for kind in sizes:
            units = hft.categories[f"blocks.{block}", kind]
            names = [name for unit in units for name in hft.units[unit]]
            own = [model.get_parameter(name) for name in names]
            assert sum(item.numel() for item in own) == {"attention": 4, "matrix": 8}[kind] * d * d
            sizes[kind] = sum(item.numel() for item in own if item.requires_grad)
        assert sizes == {"attention": 2 * d * d, "matrix": 4 * d * d}


def test_frozen_halves_stay_and_all_else_moves():
    model, optimizer, hft, stepper = setup()
    before = values(model)
    train(stepper, 5)
    frozen = {n for unit in set(hft.units) - hft.active for n in hft.units[unit]}
    assert moved(before, model) == set(before) - frozen
    assert {"embed.weight", "norm.bias", "head.weight"} <= moved(before, model)
    named = dict(model.named_parameters())
    assert not any(named[name] in optimizer.state for name in frozen)


def test_a_projection_goes_with_its_bias():
    names = [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.bias",
        "resblocks.0.attn.in_proj_weight",
        "resblocks.0.attn.in_proj_bias",
        "resblocks.0.attn.out_proj.weight",
        "resblocks.0.attn.q_proj_weight",
    ]
    assert units_of(names) == {
        "blocks.0.attn.qkv": names[:2],
        "resblocks.0.attn.in_proj": names[2:4],
        "resblocks.0.attn.out_proj": names[4:5],
        "resblocks.0.attn.q_proj": names[5:],
    }


@pytest.mark.parametrize(
    ("unit", "matrix", "expected"),
    [
        (".attn.qkv", True, "attention"),
        (".attn.in_proj", True, "attention"),
        (".self_attn.q_proj", True, "attention"),
        (".attention.output.dense", True, "attention"),
        (".attn.qkv.adapters.default.q", True, "attention"),
        (".mlp.c_fc", True, "matrix"),
        (".conv2", True, "matrix"),
        (".intermediate.dense.adapters.default.weight", True, "matrix"),
        (".norm1", False, "norm"),
        (".ln_2", False, "norm"),
        (".attn.q_norm", False, "norm"),
        (".layernorm_before", False, "norm"),
        (".bn1", False, "norm"),
        (".ls1", False, "vector"),
        ("", False, "vector"),
    ],
)
def test_the_category_of_a_unit(unit, matrix, expected):
    assert category(unit, matrix=matrix) == expected


def test_odd_categories_train_the_larger_half():
    model = vl.inject(tower(), "full", ["attn.q", "attn.k", "attn.v", "mlp.fc1"])
    _, _, hft, _ = setup(model)
    counts = {
        key: (len(units), len(hft.active.intersection(units)))
        for key, units in hft.categories.items()
    }
    assert set(counts) == {(f"blocks.{i}", kind) for i in range(4) for kind in counts_of()}
    for (_, kind), found in counts.items():
        assert found == counts_of()[kind]


def counts_of():
    return {"attention": (3, 2), "matrix": (1, 1)}


def test_the_draw_follows_the_seed_and_holds_without_reselecting():
    def course(seed, **options):
        torch.default_generator.manual_seed(seed + 23)
        _, _, hft, stepper = setup(seed=seed, **options)
        seen = [frozenset(hft.active)]
        for step in range(6):
            train(stepper, 1, step)
            seen.append(frozenset(hft.active))
        return seen

    assert course(0) == course(0)
    assert len(set(course(0))) == 1
    assert course(0)[0] != course(1)[0]
    again = course(0, reselect_every=2)
    assert again[0] == again[1] == course(0)[0]
    assert len({again[0], again[2], again[4], again[6]}) > 1
    assert (again[2], again[4]) == (again[3], again[5])


def run(model, folder, source=batches, *, resume=False):
    optimizer = adamw(model)
    hft = HFTConfig(reselect_every=3).build(model, optimizer, 10)
    return fit(
        model,
        optimizer,
        loss,
        source,
        TrainSettings(steps=10, device="cpu", checkpoint_every=1, log_every=4),
        RunDirectory(folder, resume=resume),
        dynamics=[hft],
    )


def test_a_run_that_died_resumes_bit_identically(tmp_path):
    def source(step):
        if step == 7:
            raise OSError("power cut")
        return batches(step)

    whole, resumed = tower(), tower()
    run(whole, tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        run(tower(), tmp_path / "part", source)
    assert run(resumed, tmp_path / "part", resume=True).resumed_from == 7
    assert exact(resumed) == exact(whole)
    assert all(item.requires_grad for item in resumed.parameters())


def test_a_model_without_blocks_and_impossible_options_are_refused():
    model = vl.freeze_base(tower(), "embed")
    with pytest.raises(ConfigError, match=r"hft: none of the 2 trained .* embed.weight, embed"):
        setup(model)
    with pytest.raises(ConfigError, match="reselect_every must be at least 1 or None, got 0"):
        HFTConfig(reselect_every=0)
    with pytest.raises(ConfigError, match="both decide what is frozen"):
        HFTConfig().check(build_config("full"), [LISAConfig()])
