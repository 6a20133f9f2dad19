"""Projected gradients: the weight moves along the gradient as far as frozen factors let it."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.equivalent import Pair
from visionlora.dynamics.projected import ProjectedConfig
from visionlora.errors import ConfigError
from visionlora.ranks.structure import places_of


def network():
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def adapted(method, **options):
    return vl.inject(network(), method, ["0", "2"], **{"rank": 2, "alpha": 6.0, **options})


DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model):
    return lambda x: (model(x) - 1.0).square().mean()


def slopes(model):
    """Return dL/dW of every adapted layer of the merged model."""
    plain = network()
    for place in places_of(model):
        weight = place.host.view(place.key)
        plain.get_submodule(place.path).weight.data.copy_(weight + place.delta.delta(weight))
    loss_of(plain)(DATA).backward()
    return {place.path: plain.get_submodule(place.path).weight.grad for place in places_of(model)}


def changes(model):
    return {p.path: p.delta.delta(p.host.view(p.key)).detach() for p in places_of(model)}


def stepper_of(model, rate, ridge=0.0, kind=torch.optim.SGD):
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    dynamics = ProjectedConfig(ridge=ridge).build(model, optimizer, 10)
    return Stepper(model, optimizer, dynamics=[dynamics])


@pytest.mark.parametrize("options", [{"method": "lora-fa"}, {"method": "lora-xs", "init": "zero"}])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_descent_moves_the_weight_along_the_projected_gradient(options, strength):
    model = adapted(**options)
    vl.set_scale(model, strength)
    g = slopes(model)
    stepper_of(model, 0.1).step([DATA], loss_of(model))
    for place in places_of(model):
        frozen = place.delta.frozen()
        along = g[place.path] @ torch.linalg.pinv(frozen["A"]) @ frozen["A"]
        if "B" in frozen:
            along = frozen["B"] @ torch.linalg.pinv(frozen["B"]) @ along
        assert_close(strength * changes(model)[place.path], -0.1 * along)


def test_frozen_down_is_the_first_step_of_a_free_pair():
    model = adapted("lora-fa")
    stepper = stepper_of(model, 1.0)
    loss_of(model)(DATA).backward()
    expected = {}
    for place in places_of(model):
        A, B = place.delta.frozen()["A"], place.delta.B.detach()
        pair = Pair.of(B, A, place.delta.scale, 0.0)
        expected[place.path] = pair.optimal(place.delta.B.grad, torch.zeros_like(A))[0]
    model.zero_grad()
    stepper.step([DATA], loss_of(model))
    for place in places_of(model):
        assert_close(place.delta.B.detach(), -expected[place.path])


def test_orthonormal_bases_with_scale_one_change_nothing():
    models = [adapted("lora-xs", alpha=2.0) for _ in range(2)]
    for model in models:
        for place in places_of(model):
            place.delta.A.copy_(torch.linalg.qr(place.delta.A.T).Q.T)
    stepper_of(models[0], 0.1).step([DATA], loss_of(models[0]))
    plain = torch.optim.SGD([p for p in models[1].parameters() if p.requires_grad], lr=0.1)
    Stepper(models[1], plain).step([DATA], loss_of(models[1]))
    for one, other in zip(places_of(models[0]), places_of(models[1]), strict=True):
        assert_close(one.delta.R.detach(), other.delta.R.detach())


def test_regularisation_barely_shows_and_the_loss_falls():
    model = adapted("lora-xs")
    stepper = stepper_of(model, 0.05, ridge=1e-6)
    losses = [stepper.step([DATA], loss_of(model)).loss for _ in range(4)]
    exact = adapted("lora-xs")
    stepper = stepper_of(exact, 0.05)
    assert losses == pytest.approx(
        [stepper.step([DATA], loss_of(exact)).loss for _ in range(4)], 1e-4
    )
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["lora", "dora", "slora", "full"])
def test_methods_without_frozen_factors_are_refused(method):
    model = vl.inject(network(), method, ["0"], **({} if method == "full" else {"rank": 2}))
    with pytest.raises(ConfigError, match="onto frozen factors"):
        stepper_of(model, 0.1)


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="ridge"):
        ProjectedConfig(ridge=-1.0)
    with pytest.raises(ConfigError, match="divides by the scale"):
        stepper_of(adapted("lora-fa", alpha=0.0), 0.1)
