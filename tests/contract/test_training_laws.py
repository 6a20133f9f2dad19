"""What training sees: counts, who gets gradients, reproducible numbers, a loss that falls."""

import dataclasses

import pytest
import torch

import visionlora as vl
from tests.contract.cases import (
    CONFIGS,
    DEFAULTS,
    adapted,
    deltas_of,
    host_of,
    inject,
    is_routed,
    pairs,
    without_noise,
)
from tests.contract.kinds import FEW, KINDS
from visionlora.record import SHARED


@pairs(CONFIGS, KINDS)
def test_the_trainable_count_is_the_closed_form(config, kind):
    model = inject(kind.model(), config, kind)
    sites = host_of(model).state.sites["default"].values()
    expected = sum(
        vl.get_method(config.method).delta.site_parameter_count(config, site) for site in sites
    )
    shared = vl.get_method(config.method).shared
    expected += 0 if shared is None else shared.parameter_count(config, list(sites))
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == expected
    assert vl.summary(model).trainable == expected
    # and the sites are the rows of the stored weights that the kind declares
    for key, site in host_of(model).state.sites["default"].items():
        name, rows = kind.views[key]
        own = kind.model().layer.get_parameter(name)[rows]
        shape = tuple(own.reshape(len(own), -1).shape)
        assert (site.out_features, site.in_features) == shape[:: -1 if kind.indices else 1]


@pairs(DEFAULTS, KINDS)
def test_every_trainable_gets_a_gradient_within_two_steps_and_nothing_else_does(config, kind):
    model = inject(kind.model(), config, kind)
    trainable = dict(vl.trainable_parameters(model))
    frozen = {name: item for name, item in model.named_parameters() if name not in trainable}
    kept = {name: item.clone() for name, item in frozen.items()}
    reached = set()
    optimizer = torch.optim.SGD(trainable.values(), lr=0.05)
    for step in range(3):
        output = model(*kind.inputs(step))
        optimizer.zero_grad()
        (output * torch.randn_like(output)).sum().backward()
        for name, item in trainable.items():
            assert item.grad is not None, name
            assert bool(torch.isfinite(item.grad).all()), name
            if bool((item.grad != 0).any()):
                reached.add(name)
        optimizer.step()
    # A key bias never matters to a softmax, but every tensor here is a factor of a weight.
    assert reached == set(trainable)
    for name, item in frozen.items():
        assert item.grad is None, name
        assert not item.requires_grad, name
        assert torch.equal(item, kept[name]), name


@pairs(CONFIGS, FEW)
def test_five_steps_lower_the_loss(config, kind):
    # How far a step moves the weight differs by method, so one of these step sizes has to do.
    rates = (5e-2, 5e-3, 5e-4, 5e-5)
    courses = (losses_of_five_steps(config, kind, rate) for rate in rates)
    assert any(losses[5] < losses[1] <= losses[0] for losses in courses)


def losses_of_five_steps(config, kind, rate):
    model = inject(kind.model(), config, kind)
    inputs = kind.inputs()
    goal = kind.model(seed=5)(*inputs).detach()
    optimizer = torch.optim.SGD([item for _, item in vl.trainable_parameters(model)], lr=rate)
    losses = []
    for _ in range(6):
        loss = (model(*inputs) - goal).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pairs(CONFIGS, FEW)
def test_the_same_seed_gives_the_same_numbers_whatever_the_global_generator(config, kind):
    def values(config, global_seed):
        torch.manual_seed(global_seed)
        model = inject(kind.model(), config, kind)
        state = {f"{key}.{n}": t for key, d in deltas_of(model).items() for n, t in named(d)}
        for name, part in getattr(model, SHARED, {}).items():
            state.update((f"{name}.{n}", t) for n, t in named(part))
        return state

    def named(module):
        return [*module.named_parameters(), *module.named_buffers()]

    one, two = values(config, 1), values(config, 2)
    assert one
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = values(dataclasses.replace(config, seed=1), 1)
    depends = any(not torch.equal(one[key], other[key]) for key in one)
    deltas = deltas_of(inject(kind.model(), config, kind)).values()
    assert depends is any(delta.seeded for delta in deltas)


@pairs(CONFIGS, FEW)
def test_the_global_generator_is_left_alone(config, kind):
    model = kind.model()
    inputs = kind.inputs()
    before = torch.get_rng_state()
    inject(model, config, kind)
    without_noise(model.train())(*inputs).sum().backward()
    if not is_routed(config):
        vl.merge(model)
    vl.eject(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_sites_of_one_shape_start_from_different_numbers():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    vl.inject(layers, "lora", targets="type:Linear", rank=2)
    one, two = (layer.adapters["default"]["weight"].A for layer in layers)
    assert not torch.equal(one, two)


def depends_on_all_sites(config):
    shared = vl.get_method(config.method).shared
    return shared is not None and shared.depends_on_all_sites


def serves_linear(config):
    return "linear" in config.kinds


@pytest.mark.parametrize(
    "config",
    [item for item in DEFAULTS if serves_linear(item) and not depends_on_all_sites(item)],
    ids=lambda config: config.method,
)
def test_numbers_do_not_depend_on_which_other_sites_there_are(config):
    def build(targets):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        return vl.inject(layers, config, targets=targets)

    alone, both = build("1"), build(["0", "1"])
    for one, two in zip(alone[1].parameters(), both[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "config", [item for item in DEFAULTS if serves_linear(item)], ids=lambda item: item.method
)
def test_tall_and_wide_sites_live_side_by_side(config):
    layers = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)).double()
    vl.inject(layers, config, targets="type:Linear")
    x = torch.randn(3, 8, dtype=torch.float64)
    for _ in range(2):
        layers(x).square().sum().backward()
    assert all(item.grad is not None for _, item in vl.trainable_parameters(layers))


@pairs(DEFAULTS, FEW)
def test_an_example_does_not_depend_on_its_batch(config, kind):
    model = adapted(config, kind).eval()
    (x,) = kind.inputs()
    together, reverse = model(x), model(x.flip(0)).flip(0)
    torch.testing.assert_close(together, reverse, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(together[:1], model(x[:1]), atol=1e-12, rtol=1e-12)
