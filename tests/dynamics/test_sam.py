"""The laws of two passes: what moves, by how much, how gradients combine, what comes back."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, PlainBackend, Stepper
from visionlora.dynamics.sam import SAMConfig, inner, mixed, projected
from visionlora.errors import ConfigError

F64 = torch.float64


class Tower(nn.Module):
    """Two adapted layers, dropout between them, and a head."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.drop, self.head = nn.Dropout(drop), nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.second(self.drop(torch.tanh(self.first(x))))))


def tower(drop=0.0, method="lora", dtype=F64, moved=True, **options):
    """Return a tower with an adapter away from its start, and a trained head."""
    torch.default_generator.manual_seed(0)
    model = Tower(drop).to(dtype)
    vl.inject(model, method, ["first", "second"], rank=2, **options)
    model.head.requires_grad_(True)
    if moved:
        with torch.no_grad():
            for parameter in adapted(model):
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=dtype))
    return model


def adapted(model):
    return [p for name, p in model.named_parameters() if "adapters" in name]


def batch(count=16, dtype=F64):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model):
    return lambda x: (model(x) - 1.0).square().mean()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stepper(model, config, steps=8, optimizer=torch.optim.SGD, lr=0.1, **options):
    made = optimizer(trained(model), lr=lr)
    dynamics = [] if config is None else [config.build(model, made, steps)]
    return Stepper(model, made, dynamics=dynamics, **options)


class Watch(Dynamics):
    """Notes gradients when they are complete."""

    name = "watch"

    def on_grads_ready(self, context):
        self.gradients = [p.grad.clone() for p in context.parameters]


def gradients(model, config, micro_batches, loss_fn):
    """Return the gradients that a step would use, and leave the model as it is."""
    watch = Watch()
    made = torch.optim.SGD(trained(model), lr=0.0)
    dynamics = [watch] if config is None else [config.build(model, made, 8), watch]
    Stepper(model, made, dynamics=dynamics).step(micro_batches, loss_fn)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return dict(zip(names, watch.gradients, strict=True))


def quadratic(model, seed=3):
    """Return `phi^T H phi / 2` over all adapter tensors, its phi and H."""
    phi = adapted(model)
    size = sum(p.numel() for p in phi)
    half = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    hessian = half @ half.T / size
    head = [p for name, p in model.named_parameters() if "head" in name]

    def loss(weight):
        vector = torch.cat([p.flatten() for p in phi])
        return weight * (vector @ hessian @ vector) / 2 + sum(p.square().sum() for p in head)

    return loss, torch.cat([p.detach().flatten() for p in phi]), hessian


def of_phi(found):
    return torch.cat([g.flatten() for name, g in found.items() if "adapters" in name])


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_on_a_quadratic_the_gradient_is_that_of_a_penalised_norm(weight):
    """(1 - b) g + b gs = H phi + b rho H H phi / |H phi|, and grad |H phi| = H H phi / |H phi|."""
    model = tower()
    loss, phi, hessian = quadratic(model)
    config = SAMConfig(rho=0.2, mode="mix", weight=weight)
    slope = hessian @ phi
    expected = slope + weight * 0.2 * hessian @ slope / slope.norm()
    assert_close(of_phi(gradients(model, config, [0.5, 1.5], loss)), expected)
    point = phi.clone().requires_grad_()
    (penalty,) = torch.autograd.grad((hessian @ point).norm(), point)
    assert_close(expected, slope + weight * 0.2 * penalty)


def test_sam_is_the_mix_of_weight_one():
    model = tower()
    one = gradients(model, SAMConfig(), [batch()], loss_of(model))
    other = gradients(model, SAMConfig(mode="mix", weight=1.0), [batch()], loss_of(model))
    assert same(one, other)
    assert not same(one, gradients(model, None, [batch()], loss_of(model)))


def test_weight_zero_is_plain_training():
    model = tower()
    plain = gradients(model, None, [batch()], loss_of(model))
    for mode in ("mix", "project"):
        config = SAMConfig(mode=mode, weight=0.0)
        assert same(plain, gradients(model, config, [batch()], loss_of(model)))


def disagreeing(model):
    """Return a loss whose gradient turns round within the radius: a narrow valley."""
    phi = adapted(model)
    centre = [p.detach() - 0.01 for p in phi]
    head = [p for name, p in model.named_parameters() if "head" in name]

    def loss(weight):
        steep = sum((1 - torch.cos(20 * (p - c))).sum() for p, c in zip(phi, centre, strict=True))
        return weight * steep + sum(p.sum() for p in phi) + sum(p.sum() for p in head)

    return loss


def test_projected_gradient_is_orthogonal_to_the_one_uphill():
    model = tower()
    loss = disagreeing(model)
    clean = of_phi(gradients(model, None, [1.0], loss))
    uphill = of_phi(gradients(model, SAMConfig(rho=1.0), [1.0], loss))
    assert clean @ uphill < 0
    found = of_phi(gradients(model, SAMConfig(rho=1.0, mode="project"), [1.0], loss))
    assert abs(found @ uphill) < 1e-10 * clean.norm() * uphill.norm()
    assert_close(found, clean - (clean @ uphill) / uphill.square().sum() * uphill)
    half = of_phi(gradients(model, SAMConfig(rho=1.0, mode="project", weight=0.5), [1.0], loss))
    assert_close(half, (found + clean) / 2)


def test_gradients_that_agree_are_not_projected():
    model = tower()
    config = SAMConfig(rho=1e-3, mode="project")
    plain = gradients(model, None, [batch()], loss_of(model))
    assert same(plain, gradients(model, config, [batch()], loss_of(model)))


def test_rules_on_plain_tensors():
    generator = torch.Generator().manual_seed(0)
    g, gs = ([torch.randn(3, 2, generator=generator, dtype=F64) for _ in range(2)] for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(mixed(0.0)(g, gs), g, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mixed(1.0)(g, gs), gs, strict=True))
    against = [-item for item in g]
    assert inner(projected(1.0)(g, against), against) == pytest.approx(0.0, abs=1e-12)
    zero = [torch.zeros_like(item) for item in g]
    assert all(torch.equal(a, b) for a, b in zip(projected(1.0)(g, zero), g, strict=True))


def test_one_norm_over_all_adapter_tensors():
    """The move has length rho over both layers together, and leaves everything else in place."""
    model = tower()
    before = values(model)
    seen = []

    def loss(x):
        seen.append(values(model))
        return loss_of(model)(x)

    stepper(model, SAMConfig(rho=0.07)).step(list(batch().split(4)), loss)
    assert len(seen) == 8  # one move for all micro-batches
    for clean, moved in zip(seen[:4], seen[4:], strict=True):
        assert same(clean, before)
        total = sum(float((moved[key] - before[key]).square().sum()) for key in before)
        assert total**0.5 == pytest.approx(0.07, rel=1e-10)
        still = {key for key in before if torch.equal(moved[key], before[key])}
        assert still == {key for key in before if "adapters" not in key}


def test_from_the_start_only_the_up_matrices_move():
    model = tower(moved=False)  # B = 0, so that A has no gradient
    before, seen = values(model), []

    def loss(x):
        seen.append(values(model))
        return loss_of(model)(x)

    stepper(model, SAMConfig()).step([batch()], loss)
    moved = {key for key in before if not torch.equal(seen[1][key], before[key])}
    assert moved == {key for key in before if key.endswith(".B")}


def test_a_head_keeps_its_first_gradient():
    model = tower()
    plain = gradients(model, None, [batch()], loss_of(model))
    found = gradients(model, SAMConfig(rho=0.5), [batch()], loss_of(model))
    for name in plain:
        assert torch.equal(plain[name], found[name]) == ("head" in name)


@pytest.mark.parametrize("method", ["lora", "dora", "block-lora", "slora", "lora-xs", "lora-fa"])
def test_a_step_of_rate_zero_changes_no_bit(method):
    options = {"dropout": 0.0} if method == "block-lora" else {}
    model = tower(method=method, dtype=torch.float32, **options)
    before = values(model)
    run = stepper(model, SAMConfig(rho=0.3), lr=0.0)
    for _ in range(3):
        run.step([batch(dtype=torch.float32)], loss_of(model))
    assert same(values(model), before)


def test_frozen_tensors_never_change_and_get_no_gradient():
    model = tower()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before, run = values(model), stepper(model, SAMConfig())
    for _ in range(3):
        run.step([batch()], loss_of(model))
    after = values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert frozen == before.keys() - changed
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_accumulated_micro_batches_equal_one_batch():
    model = tower()
    other = copy.deepcopy(model)
    whole, parts = stepper(model, SAMConfig(rho=0.2)), stepper(other, SAMConfig(rho=0.2))
    for _ in range(4):
        whole.step([batch()], loss_of(model))
        parts.step(list(batch().split(4)), loss_of(other))
    for one, two in zip(trained(model), trained(other), strict=True):
        assert_close(one, two)


def test_both_passes_have_the_same_dropout_masks():
    model = tower(drop=0.5)
    masks = []
    model.drop.register_forward_hook(lambda _, inputs, y: masks.append(y == 0))
    run = stepper(model, SAMConfig(rho=0.2))
    run.step(list(batch().split(4)), loss_of(model))
    assert len(masks) == 8
    for one, other in zip(masks[:4], masks[4:], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(masks[0], masks[1])


def test_without_a_move_the_second_gradient_is_the_first():
    """Although the model and its adapters drop."""

    def first_and_second(rho):
        model = tower(drop=0.3, dropout=0.5)
        torch.default_generator.manual_seed(5)
        plain = gradients(model, None, [batch()], loss_of(model))
        torch.default_generator.manual_seed(5)
        return plain, gradients(model, SAMConfig(rho=rho), [batch()], loss_of(model))

    assert same(*first_and_second(0.0))
    assert not same(*first_and_second(0.1))


def test_two_forwards_per_step():
    model = tower()
    run = stepper(model, SAMConfig())
    for count in (2, 4, 6):
        run.step([batch()], loss_of(model))
        assert model.calls == count


def test_no_second_pass_after_a_non_finite_first():
    model = tower()
    before, run = values(model), stepper(model, SAMConfig())
    assert run.step([batch()], lambda x: loss_of(model)(x) * float("nan")).skipped
    assert model.calls == 1
    assert same(values(model), before)


def test_a_non_finite_second_pass_skips_the_step():
    model = tower()
    before, run = values(model), stepper(model, SAMConfig())

    def breaks(x):
        loss = loss_of(model)(x)
        return loss if model.calls < 2 else loss * float("inf")

    assert run.step([batch()], breaks).skipped
    assert same(values(model), before)


def test_an_exception_in_the_second_pass_leaves_the_tensors_in_place():
    model = tower()
    before = values(model)

    def fails(x):
        if model.calls == 1:
            raise OSError("power cut")
        return loss_of(model)(x)

    with pytest.raises(OSError, match="power cut"):
        stepper(model, SAMConfig(rho=0.5)).step([batch()], fails)
    assert same(values(model), before)


class Autocast(PlainBackend):
    """bfloat16 on the CPU."""

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)


def test_under_autocast_both_passes_run_in_bfloat16():
    model, exact = (tower(dtype=torch.float32) for _ in range(2))
    x = batch(dtype=torch.float32)
    kinds = []

    def loss(x):
        y = model(x)
        kinds.append(y.dtype)
        return (y.float() - 1.0).square().mean()

    low = stepper(model, SAMConfig(rho=0.2), backend=Autocast())
    full = stepper(exact, SAMConfig(rho=0.2))
    for _ in range(3):
        assert not low.step([x], loss).skipped
        full.step([x], loss_of(exact))
    assert kinds == [torch.bfloat16] * 6
    for one, other in zip(trained(model), trained(exact), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


class Scaled(PlainBackend):
    """A loss scale, as fp16 has."""

    def __init__(self):
        self.scaled = 0

    def backward(self, loss):
        torch.autograd.backward(1024.0 * loss)

    def loss_scale(self):
        return 1024.0

    def unscale(self, optimizer):
        self.scaled += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(1024.0)


def test_a_loss_scale_leaves_no_trace():
    """A power of two, so that scaling is exact: both passes see unscaled gradients."""
    model = tower()
    other = copy.deepcopy(model)
    backend = Scaled()
    run = stepper(model, SAMConfig(), backend=backend)
    plain = stepper(other, SAMConfig())
    for _ in range(2):
        run.step([batch()], loss_of(model))
        plain.step([batch()], loss_of(other))
    assert backend.scaled == 4
    assert same(values(model), values(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho must not be negative, got -0\.1"),
        ({"mode": "mix", "weight": 1.5}, r"weight must lie in \[0, 1\], got 1\.5"),
        ({"weight": 0.5}, r"weight belongs to the modes 'mix' and 'project'"),
        ({"mode": "asam"}, r"mode must be one of 'sam', 'mix', 'project', got 'asam'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SAMConfig(**options)


def test_a_model_without_a_trained_adapter_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="sam moves the tensors of adapters, but the optimizer"):
        SAMConfig().build(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
