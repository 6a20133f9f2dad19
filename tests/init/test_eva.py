"""EVA starts along the components of the inputs, and gives ranks to the layers that need them."""

import dataclasses

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import visionlora as vl
from tests.init.given import given, matrix
from tests.init.looking import cross_entropy, tower, vectors
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, VisionLoraError
from visionlora.init.base import Components, SiteStats
from visionlora.init.eva import EVA
from visionlora.methods.lora import LoRAConfig
from visionlora.ranks.structure import places_of


def components(ratios, width=10):
    """Orthonormal directions with given explained variances."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    vectors = torch.linalg.qr(matrix(width, len(ratios))).Q.t()
    return SiteStats(components=Components(vectors, (100 * ratio).sqrt(), ratio))


def ranks(offers, rank=2, **options):
    """Return the ranks of layers of equal rank with given explained variances."""
    configs = dict.fromkeys(offers, LoRAConfig(rank=rank))
    return EVA(**options).ranks(configs, {name: components(r) for name, r in offers.items()})


# -- the shares


def test_the_budget_goes_to_the_largest_ratios():
    found = ranks({"a": [0.4, 0.3, 0.2, 0.1], "b": [0.9, 0.05, 0.03, 0.02], "c": [0.25] * 4})
    # 0.9 | 0.4 | 0.3 | 0.25 0.25 0.25
    assert found == {"a": 2, "b": 1, "c": 3}


def test_no_site_gets_more_than_rho_times_its_rank():
    offers = {"a": [0.3] * 3, "b": [0.1, 0.1, 0.1], "c": [0.01] * 3}
    assert ranks(offers, rho=1.5) == {"a": 3, "b": 3, "c": 0}
    assert ranks(offers, rho=1) is None


def test_ties_go_to_the_first_layer():
    offers = {"b": [0.25] * 4, "a": [0.25] * 4, "c": [0.25] * 4}
    assert ranks(offers) == {"b": 4, "a": 2, "c": 0}


def test_the_budget_is_the_sum_of_the_ranks_and_directions_without_variance_get_none():
    configs = {"a": LoRAConfig(rank=4), "b": LoRAConfig(rank=1)}
    stats = {"a": components([0.6, 0.4, 0.0, 0.0, 0.0]), "b": components([0.9, 0.1])}
    assert EVA().ranks(configs, stats) == {"a": 2, "b": 2}
    stats = {"a": components([0.3, 0.2, 0.1, 0.1, 0.1]), "b": components([0.9, 0.1])}
    assert sum(EVA().ranks(configs, stats).values()) == 5


# -- the start


def test_A_holds_the_components_and_B_stays_zero():
    stats = components([0.5, 0.3, 0.2])
    start = EVA().start(dataclasses.replace(given(), stats=stats))
    assert_close(start.down, stats.components.vectors)
    assert start.up is None
    assert start.core is None
    assert not start.taken_off


def test_whitening_evens_out_the_components():
    stats = components([0.5, 0.3, 0.2])
    start = EVA(whiten=True).start(dataclasses.replace(given(), stats=stats))
    norms = start.down.norm(dim=1)
    assert_close(norms, stats.components.singular.rsqrt())
    assert_close(start.down / norms[:, None], stats.components.vectors)


@pytest.mark.parametrize("method", ["lora", "dora", "slora", "block-lora"])
def test_the_function_does_not_change_and_the_branch_sees_the_leading_inputs(method):
    model = tower(method, **({"dropout": 0.0} if method == "block-lora" else {})).eval()
    x = vectors()[0][0]
    before = model(x)
    report = vl.initialise(model, "eva", vectors(), cross_entropy, rho=1.0)
    assert_close(model(x), before)
    delta = model.qkv.adapters["default"]["q"]
    flat = torch.cat([batch[0] for batch in vectors()]).reshape(-1, 8)
    _, _, rows = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    rank = len(delta.A)
    assert_close((delta.A * rows[:rank]).sum(1).abs(), torch.ones(rank).double())
    assert set(report.ranks.values()) == {2}


def test_between_frozen_bases_only_A_is_taken():
    model = tower("lora-xs")
    bases = {p.name: p.delta.B.clone() for p in places_of(model)}
    vl.initialise(model, "eva", vectors(), cross_entropy, rho=1.0)
    for place in places_of(model):
        delta = place.delta
        assert_close(delta.B, bases[place.name])
        assert_close(delta.A @ delta.A.t(), torch.eye(2).double())


def test_ranks_follow_the_data_and_scales_stay():
    model = tower(rank=2, alpha=3.0)
    before = {p.name: p.delta.scale for p in places_of(model)}
    report = vl.initialise(model, "eva", vectors(), cross_entropy)
    places = {p.name: p for p in places_of(model)}
    assert sum(report.ranks.values()) == 2 * len(before)
    assert len(set(report.ranks.values())) > 1
    for name, rank in report.ranks.items():
        assert (name in places) is (rank > 0)
        if rank:
            assert places[name].delta.A.shape[0] == rank
            assert places[name].delta.scale == pytest.approx(before[name])


def test_rslora_keeps_its_scale_too():
    model = tower(rank=2, alpha=3.0, scaling="rslora")
    scale = places_of(model)[0].delta.scale
    vl.initialise(model, "eva", vectors(), cross_entropy)
    assert {round(p.delta.scale, 9) for p in places_of(model)} == {round(scale, 9)}


def test_block_lora_keeps_its_ranks():
    model = tower("block-lora", dropout=0.0)
    report = vl.initialise(model, "eva", vectors(), cross_entropy)
    assert set(report.ranks.values()) == {2}


def test_a_redistributed_adapter_can_be_saved_and_loaded(tmp_path):
    torch.default_generator.manual_seed(0)
    model = tower().eval()
    vl.initialise(model, "eva", vectors(), cross_entropy)
    for _, parameter in vl.trainable_parameters(model):
        parameter.data.normal_(0, 0.1)
    x = vectors()[0][0]
    expected = model(x)
    vl.save(model, tmp_path / "adapter.safetensors")
    vl.load(vl.eject(model), tmp_path / "adapter.safetensors")
    assert_close(model(x), expected)


# -- beside the reference


def test_components_and_ranks_are_those_of_peft():
    torch.default_generator.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(64, 6) * torch.logspace(0, -1, 6)
    config = peft.LoraConfig(
        r=2,
        target_modules=["0", "2"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99, whiten=True),
    )
    # One batch, seen again and again, so that its components and those of all data are the same.
    theirs = get_eva_state_dict(
        layers,
        [x],
        config,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    model = vl.inject(nn.Sequential(*layers), "lora", ["0", "2"], rank=2)
    report = vl.initialise(model, "eva", [x], lambda m, b: m(b).mean(), tau=None)
    assert {name: report.ranks[f"{name}.weight"] for name in theirs} == {
        name: len(rows) for name, rows in theirs.items()
    }
    for name, rows in theirs.items():
        A = model.get_submodule(name).adapters["default"]["weight"].A
        rows = rows / rows.norm(dim=1, keepdim=True)
        assert (A * rows).sum(1).abs().min() > 0.999


# -- what is refused


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="rho must be at least 1"):
        EVA(rho=0.5)
    with pytest.raises(ConfigError, match="tau must lie in"):
        EVA(tau=1.0)
    with pytest.raises(ConfigError, match="eva looks at data"):
        vl.inject(nn.Linear(8, 3), "lora", init="eva", rank=2)
    with pytest.raises(ConfigError, match="eva cannot start lora-fa"):
        vl.initialise(tower("lora-fa"), "eva", vectors(), cross_entropy)


def test_too_few_directions_are_refused():
    model = vl.inject(nn.Linear(8, 6).double(), "lora", rank=4)
    few = [torch.randn(3, 8).double()]
    with pytest.raises(ConfigError, match="have 2 directions, fewer than rank 4"):
        vl.initialise(model, "eva", few, lambda m, b: m(b).mean(), rho=1.0)
    report = vl.initialise(model, "eva", few, lambda m, b: m(b).mean())
    assert report.ranks == {"weight": 2}
    with pytest.raises(ConfigError, match=r"no components for layer.weight"):
        EVA().start(given())


def test_inputs_that_never_change_leave_no_site():
    model = vl.inject(nn.Linear(8, 6).double(), "lora", rank=2)
    same = [torch.ones(5, 8).double()]
    with pytest.raises(VisionLoraError, match="without a site"):
        vl.initialise(model, "eva", same, lambda m, b: m(b).mean())
    assert model.adapters["default"]["weight"].A.shape == (2, 8)
