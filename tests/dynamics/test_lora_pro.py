"""LoRA-Pro: pairs move as the weight would."""

import copy
from itertools import pairwise

import pytest
import torch

import visionlora as vl
from tests.dynamics.pairs import (
    DATA,
    WIDTH,
    adapted,
    assert_same_weights,
    exactly,
    full_training,
    gradients_of_weights,
    loss_of,
    network,
    normal,
    train,
    trained,
    trainer,
    weights,
)
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.ranks.structure import places_of


@pytest.mark.parametrize("choice", ["sylvester", "zero", "symmetric"])
def test_one_step_of_descent_moves_the_weight_along_the_projected_gradient(choice):
    model = adapted(rank=2, alpha=6.0)
    slopes, before = gradients_of_weights(model), weights(model)
    pairs = {
        p.path: (p.delta.B.detach().clone(), p.delta.A.detach().clone()) for p in places_of(model)
    }
    rate = 1e-4
    train(model, exactly(moments="none", choice=choice), steps=1, lr=rate)
    for path, weight in weights(model).items():
        B, A = pairs[path]
        P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
        g = slopes[path]
        along = P_B @ g + g @ P_A - P_B @ g @ P_A
        moved = (weight - before[path]).detach() / -rate
        assert float((moved - along).norm() / along.norm()) < 20 * rate


def at_full_rank():
    """Return the network with pairs of the rank of their layers and orthonormal factors."""
    model = adapted(rank=6)
    for place in places_of(model):
        assert place.site.max_rank == 6
        for factor in (place.delta.A, place.delta.B):
            U, _, V = torch.linalg.svd(factor.detach(), full_matrices=False)
            factor.data.copy_(U @ V)
    return model


@pytest.mark.parametrize(
    ("moments", "kind", "rates"),
    [("none", torch.optim.SGD, (0.1, 0.05)), ("full", torch.optim.AdamW, (2e-3, 1e-3))],
)
def test_training_at_full_rank_is_training_of_the_weight(moments, kind, rates):
    """What is left is the product of both steps, of second order in the rate."""
    errors = []
    for rate in rates:
        model = at_full_rank()
        start = weights(copy.deepcopy(model))
        plain = full_training(model, kind, rate, steps=10)
        train(model, exactly(moments=moments), steps=10, lr=rate)
        gap = moved = 0.0
        for path, weight in weights(model).items():
            full = plain.get_submodule(path).weight.detach()
            gap += float((weight.detach() - full).norm())
            moved += float((full - start[path].detach()).norm())
        errors.append(gap / moved)
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]


def test_descent_to_an_optimum_of_the_rank_of_the_pair_is_as_fast_as_on_the_weight():
    """A pair of rank 2 from zero, against descent on the whole weight at the same rate."""
    shift = normal(7, 2, seed=1) @ normal(2, WIDTH, seed=2)
    losses = {}
    for method in ("lora", "full"):
        model = vl.inject(network(), method, ["first"], **({"rank": 2} if method == "lora" else {}))
        layer = model.first
        wanted = layer(DATA).detach() + DATA @ shift.T
        optimizer = torch.optim.SGD(trained(model), lr=1.0)
        config = exactly(moments="none")
        dynamics = [config.build(model, optimizer, 60)] if method == "lora" else []
        stepper = Stepper(model, optimizer, dynamics=dynamics)
        fit_layer = lambda rows, layer=layer, wanted=wanted: (layer(DATA) - wanted).square().mean()  # noqa: E731
        losses[method] = [stepper.step([0], fit_layer).loss for _ in range(60)]
    assert losses["full"][-1] < 1e-3 * losses["full"][0]
    assert losses["lora"][-1] == pytest.approx(losses["full"][-1], rel=0.25)


@pytest.mark.parametrize("moments", ["none", "full"])
def test_trajectory_of_the_weight_from_zero_does_not_depend_on_alpha(moments):
    runs = []
    for alpha in (8.0, 64.0):
        model = adapted(rank=2, alpha=alpha, seeded=False)
        train(model, exactly(moments=moments, choice="zero"), steps=6, lr=1e-3)
        runs.append(model)
    assert_same_weights(*runs, factor=1e3)
    assert all(bool(place.delta.B.any()) for place in places_of(runs[0]))


def test_weight_does_not_depend_on_the_basis_of_the_pair():
    one, other = adapted(rank=2), adapted(rank=2)
    Q = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    with torch.no_grad():
        for place in places_of(other):
            place.delta.B.copy_(place.delta.B @ Q)
            place.delta.A.copy_(torch.linalg.inv(Q) @ place.delta.A)
    for model in (one, other):
        train(model, exactly(choice="zero"), steps=5)
    assert_same_weights(one, other, factor=10)


def test_first_step_from_zero_is_the_projected_step_of_a_frozen_down_matrix():
    model = adapted(rank=2, seeded=False)
    slopes, before = gradients_of_weights(model), weights(model)
    downs = {place.path: place.delta.A.detach().clone() for place in places_of(model)}
    train(model, exactly(moments="none"), steps=1, lr=0.1)
    for path, weight in weights(model).items():
        A = downs[path]
        assert_close(weight - before[path], -0.1 * slopes[path] @ torch.linalg.pinv(A) @ A)
    assert all(torch.equal(place.delta.A, downs[place.path]) for place in places_of(model))


def test_down_matrix_is_held_during_the_first_steps():
    model = adapted(rank=2, seeded=False)
    stepper = trainer(model, exactly(warm_b_steps=2), lr=1e-3)
    seen = []
    for _ in range(4):
        seen.append({p.path: p.delta.A.detach().clone() for p in places_of(model)})
        stepper.step([slice(None)], loss_of(model))
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(seen)]
    assert moved == [False, False, True]


def test_decay_shrinks_the_change_of_the_weight():
    """With a zero direction left, one step takes `lr * decay` of the change off."""
    model = adapted(rank=2, alpha=6.0)
    before = {p.path: p.delta.delta(p.host.view(p.key)).detach() for p in places_of(model)}
    stepper = trainer(model, exactly(moments="none"), lr=1e-3, weight_decay=0.5)
    stepper.step([slice(None)], lambda rows: 0.0 * loss_of(model)(rows))
    for place in places_of(model):
        left = place.delta.delta(place.host.view(place.key))
        shrunk = (1 - 1e-3 * 0.5) * before[place.path]
        assert float((left - shrunk).detach().norm()) < 1e-6 * float(shrunk.norm())


def test_factor_moments_are_adamw_on_the_best_step_of_the_factors():
    model, other = adapted(rank=2), adapted(rank=2)
    train(model, exactly(moments="factor"), steps=3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(trained(other), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(other)(slice(None)).backward()
        for place in places_of(other):
            A, B, s = place.delta.A.detach(), place.delta.B.detach(), place.delta.scale
            up, down = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
            gA, gB = place.delta.A.grad, place.delta.B.grad
            right = -up @ gA @ A.T / s**2
            eye = torch.eye(2, dtype=torch.float64)
            # vec(G X + X H) = (G kron I + I kron H) vec X for row-major vec and symmetric H.
            system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
            X = torch.linalg.solve(system, right.reshape(-1)).reshape(2, 2)
            place.delta.A.grad = up @ gA / s**2 + X @ A
            place.delta.B.grad = (gB - B @ up @ B.T @ gB) @ down / s**2 - B @ X
        optimizer.step()
    for one, two in zip(trained(model), trained(other), strict=True):
        assert_close(one.detach(), two.detach())
