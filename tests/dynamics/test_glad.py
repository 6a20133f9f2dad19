"""The laws of GLAD: its equation, its schedule, and plain training at weight zero."""

import pytest
import torch

from tests.dynamics.test_sam import (
    adapted,
    batch,
    gradients,
    loss_of,
    of_phi,
    quadratic,
    same,
    stepper,
    tower,
    trained,
    values,
)
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.glad import GLADConfig
from visionlora.dynamics.sam import SAMConfig
from visionlora.errors import ConfigError


def run(config, model, steps=5, optimizer=torch.optim.AdamW, **options):
    torch.default_generator.manual_seed(7)
    made = stepper(model, config, steps, optimizer, **options)
    for _ in range(steps):
        made.step(list(batch().split(8)), loss_of(model))
    return values(model)


def test_weight_zero_is_plain_training_bit_for_bit():
    plain = run(None, tower(drop=0.3, dropout=0.4))
    assert same(plain, run(GLADConfig(weight=0.0), tower(drop=0.3, dropout=0.4)))
    assert not same(plain, run(GLADConfig(), tower(drop=0.3, dropout=0.4)))


def test_weight_one_is_sam():
    assert same(run(SAMConfig(rho=0.2), tower()), run(GLADConfig(rho=0.2, weight=1.0), tower()))


def test_on_a_quadratic_the_gradient_is_the_equation():
    """g = H phi + lambda rho H H phi / |H phi|."""
    model = tower()
    loss, phi, hessian = quadratic(model)
    slope = hessian @ phi
    found = of_phi(gradients(model, GLADConfig(), [1.0], loss))
    assert_close(found, slope + 0.5 * 0.05 * hessian @ slope / slope.norm())


def test_alpha_is_taken_off_the_factor_of_the_move():
    """phi' = phi + (rho / |g| - alpha) g, so g1 = g + (rho / |g| - alpha) H g."""
    model = tower()
    loss, phi, hessian = quadratic(model)
    slope = hessian @ phi
    found = of_phi(gradients(model, GLADConfig(weight=1.0, alpha=0.02), [1.0], loss))
    assert_close(found, slope + (0.05 / slope.norm() - 0.02) * hessian @ slope)


def lengths(config, steps):
    """Return the length of the move in every step."""
    model = tower()
    made = stepper(model, config, steps)
    found = []
    for _ in range(steps):
        seen = []

        def loss(x, seen=seen):
            seen.append(torch.cat([p.detach().flatten() for p in adapted(model)]))
            return loss_of(model)(x)

        made.step([batch()], loss)
        found.append(float((seen[1] - seen[0]).norm()))
    return found


def test_every_n_steps_look_twice_and_the_others_once():
    model = tower()
    made = stepper(model, GLADConfig(every=3))
    for count in (2, 3, 4, 6, 7):
        made.step([batch()], loss_of(model))
        assert model.calls == count


def test_a_step_with_one_look_is_a_plain_step():
    model, plain = tower(), tower()
    made, other = stepper(model, GLADConfig(every=2)), stepper(plain, None)
    made.step([batch()], loss_of(model))
    plain.load_state_dict(model.state_dict())
    made.step([batch()], loss_of(model))
    other.step([batch()], loss_of(plain))
    assert same(values(model), values(plain))


def test_rho_rises_linearly_over_the_warmup():
    found = lengths(GLADConfig(rho=0.08, warmup=0.5), 8)
    assert found == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08, 0.08])
    assert lengths(GLADConfig(rho=0.08), 2) == pytest.approx([0.08, 0.08])


def test_parameters_return_bit_for_bit():
    model = tower(dtype=torch.float32)
    before = values(model)
    made = stepper(model, GLADConfig(rho=0.3, alpha=0.1), lr=0.0)
    for _ in range(3):
        made.step([batch(dtype=torch.float32)], loss_of(model))
    assert same(values(model), before)


def test_a_resumed_run_repeats_the_whole_one():
    """There is no state: schedule and radius follow from the number of the step."""
    config = GLADConfig(every=2, warmup=0.5)
    whole = tower()
    made = stepper(whole, config, 6)
    for _ in range(6):
        made.step([batch()], loss_of(whole))
    first = tower()
    half = stepper(first, config, 6)
    for _ in range(3):
        half.step([batch()], loss_of(first))
    rest = tower()
    rest.load_state_dict(first.state_dict())
    again = stepper(rest, config, 6)
    again.load_state_dict(half.state_dict())
    for _ in range(3):
        again.step([batch()], loss_of(rest))
    assert same(values(whole), values(rest))


def test_adapters_that_are_frozen_for_a_while_are_left_alone():
    model = tower()
    held = adapted(model)[0]
    held.requires_grad_(False)
    before = held.detach().clone()
    optimizer = torch.optim.SGD([*trained(model), held], lr=0.1)
    made = Stepper(model, optimizer, dynamics=[GLADConfig().build(model, optimizer, 4)])
    made.step([batch()], loss_of(model))
    assert torch.equal(held, before)
    assert held.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "glad: rho must not be negative"),
        ({"weight": -0.5}, r"glad: weight must lie in \[0, 1\]"),
        ({"every": 0}, "glad: every must be at least 1, got 0"),
        ({"warmup": 1.5}, r"glad: warmup must lie in \[0, 1\], got 1\.5"),
        ({"every": 1.5}, "every must be a whole number, got 1.5"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GLADConfig(**options)


def test_a_step_in_which_no_adapter_trains_is_a_plain_one():
    model, plain = tower(), tower()
    optimizers = [torch.optim.SGD(trained(item), lr=0.1) for item in (model, plain)]
    dynamics = [GLADConfig().build(model, optimizers[0], 4)]
    for item in (model, plain):
        for parameter in adapted(item):
            parameter.requires_grad_(False)
    Stepper(model, optimizers[0], dynamics=dynamics).step([batch()], loss_of(model))
    Stepper(plain, optimizers[1]).step([batch()], loss_of(plain))
    assert model.calls == 1
    assert same(values(model), values(plain))
