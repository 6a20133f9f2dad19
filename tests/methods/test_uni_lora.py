"""Uni-LoRA: the projection, the balance of the index, and that the list of sites matters."""

import itertools

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.methods.uni_lora import UniLoRAConfig, UniLoRAVector, balanced_index
from visionlora.sites import Site


def base(widths=(6, 10, 8, 6)):
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*layers).double()


def adapt(model=None, targets="type:Linear", **options):
    return vl.inject(model or base(), "uni-lora", targets=targets, **{"rank": 2, **options})


def shared_of(model):
    return model.visionlora_shared["default"]


def delta_of(model, index=0):
    return model[index].adapters["default"]["weight"]


def change(model, index=0):
    return delta_of(model, index).delta(model[index].weight)


def factors_in_order(model, vector):
    """Return all factor entries that a vector gives: A then B of every site, row by row."""
    parts = [shared_of(model).factors(vector, delta_of(model, i).site, 2) for i in range(3)]
    return torch.cat([item.flatten() for pair in parts for item in pair])


def dense_projection(model):
    shared = shared_of(model)
    P = torch.zeros(len(shared.index), len(shared.theta), dtype=torch.float64)
    count = torch.bincount(shared.index, minlength=len(shared.theta))
    P[torch.arange(len(P)), shared.index.long()] = count.double().rsqrt()[shared.index.long()]
    return P


@pytest.mark.parametrize("length", [1, 7, 40, 96])
def test_the_projection_is_an_isometry(length):
    model = adapt(length=length)
    P = dense_projection(model)
    assert P.shape == (2 * (16 + 18 + 14), length)
    assert_close(P.t() @ P, torch.eye(length, dtype=torch.float64))
    vector = torch.randn(length, dtype=torch.float64)
    entries = factors_in_order(model, vector)
    assert_close(entries.float(), (P @ vector).float())
    assert float(entries.norm() / vector.norm()) == pytest.approx(1.0, abs=1e-6)


def test_the_gradient_of_the_vector_is_the_projected_gradient_of_the_factors():
    model = adapt(length=11)
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    found = shared_of(model).theta.grad
    # the same factors as free tensors of plain LoRA
    free = vl.inject(base(), "lora", targets="type:Linear", rank=2)
    with torch.no_grad():
        for index in range(3):
            B, A = delta_of(model, index).factors()
            delta_of(free, index).A.copy_(A)
            delta_of(free, index).B.copy_(B)
    free(x).square().sum().backward()
    pairs = [(delta_of(free, index).A.grad, delta_of(free, index).B.grad) for index in range(3)]
    entries = torch.cat([item.flatten() for pair in pairs for item in pair])
    assert_close(found.float(), (dense_projection(model).t() @ entries).float())


@pytest.mark.parametrize(("entries", "length"), [(96, 96), (96, 95), (96, 7), (5, 5), (64, 1)])
def test_every_entry_is_used_equally_often_give_or_take_one(entries, length):
    index = balanced_index(entries, length, torch.Generator().manual_seed(3))
    count = torch.bincount(index, minlength=length)
    assert int(count.sum()) == entries
    assert int(count.min()) == entries // length
    assert int(count.max()) == -(-entries // length)


def test_one_vector_is_all_that_is_trained_and_stored(tmp_path):
    model = adapt(length=13)
    assert [tuple(item.shape) for _, item in vl.trainable_parameters(model)] == [(13,)]
    assert sum(item.numel() for item in vl.adapter_state_dict(model).values()) == 13
    sites = [Site("", str(i), "linear", 768, 768) for i in range(24)]
    assert UniLoRAVector.parameter_count(UniLoRAConfig(), sites) == 73_728  # half of 147,456
    assert UniLoRAVector.parameter_count(UniLoRAConfig(length=72_000), sites) == 72_000
    config = UniLoRAConfig(rank=2, length=13)
    assert UniLoRAVector(config, sites[:2]).index.dtype == torch.int32


def test_the_initial_change_is_small_and_with_an_anchor_exactly_zero():
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = adapt(length=13)
    assert 0 < float(change(plain).detach().abs().max()) < 1e-2
    model = adapt(length=13, anchor=True)
    assert delta_of(model).zero_at_init
    assert not bool(change(model).any())
    assert torch.equal(model(x), base()(x))
    model(x).square().sum().backward()
    assert bool(shared_of(model).theta.grad.any())  # and yet no saddle


def test_the_anchor_is_the_initial_change():
    anchored, plain = adapt(length=13, anchor=True), adapt(length=13)
    start = change(plain, 1).detach()
    moved = torch.randn(13, dtype=torch.float64)
    with torch.no_grad():
        shared_of(anchored).theta.copy_(moved)
        shared_of(plain).theta.copy_(moved)
    assert_close(change(anchored, 1), change(plain, 1) - start)


@pytest.mark.parametrize("anchor", [False, True])
def test_a_file_is_loaded_with_its_sites_only(tmp_path, anchor):
    options = {"length": 13, "anchor": anchor}
    model = adapt(**options)
    with torch.no_grad():
        shared_of(model).theta.normal_()
    path = vl.save(model, tmp_path / "uni.safetensors")
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(vl.load(base(), path)(x), model(x))
    assert torch.equal(vl.load(adapt(**options), path)(x), model(x))
    fewer = adapt(targets=["0", "1"], **options)
    before = shared_of(fewer).theta.clone()
    with pytest.raises(AdapterFileError):
        vl.load(fewer, path)
    assert torch.equal(shared_of(fewer).theta, before)
    with pytest.raises(AdapterFileError):
        vl.load(adapt(seed=1, **options), path)


def test_equal_shapes_under_other_names_are_other_sites(tmp_path):
    square = (6, 6, 6, 6)
    model = adapt(base(square), targets=["0", "1"], length=13)
    path = vl.save(model, tmp_path / "uni.safetensors")
    with pytest.raises(AdapterFileError):
        vl.load(adapt(base(square), targets=["1", "2"], length=13), path, check_base=False)


def test_the_order_of_the_targets_does_not_matter(tmp_path):
    one, two = (adapt(targets=targets, length=13) for targets in (["0", "2"], ["2", "0"]))
    assert torch.equal(change(one, 2), change(two, 2))
    path = vl.save(two, tmp_path / "uni.safetensors")
    assert torch.equal(change(vl.load(base(), path), 2), change(two, 2))
    # within one layer the sites keep the order in which they were asked for, in files too
    fused = vl.inject(nn.Sequential(nn.Linear(6, 18)), "uni-lora", targets="0[v,q]", rank=2)
    path = vl.save(fused, tmp_path / "fused.safetensors")
    fresh = vl.load(nn.Sequential(nn.Linear(6, 18)), path, check_base=False)
    assert torch.equal(shared_of(fresh).sites, shared_of(fused).sites)
    for key in "qv":
        one, two = (
            model[0].adapters["default"][key].delta(model[0].weight[:6]) for model in (fused, fresh)
        )
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_index_is_the_same_on_every_device():
    here, there = adapt(length=13), adapt(base().cuda(), length=13)
    assert torch.equal(shared_of(here).index, shared_of(there).index.cpu())
    assert torch.equal(shared_of(here).theta, shared_of(there).theta.cpu())


def test_wrong_options_are_refused():
    for options, message in [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 7}, r"rank 7.*10 x 6.*at most 6"),
        ({"length": 0}, "length must be at least 1"),
        ({"length": 97}, r"length 97.*96 factor entries of the layers"),
        ({"bound": 0.0}, "bound must be positive"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapt(**options)
