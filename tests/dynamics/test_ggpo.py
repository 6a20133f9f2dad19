"""The laws of noise on frozen weights: its size, its absence, what it is sized by."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.mixed import INDEX, TARGETS, Net
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, Stepper
from visionlora.dynamics.ggpo import GGPOConfig
from visionlora.dynamics.glad import GLADConfig
from visionlora.dynamics.slope import change_and_gradient
from visionlora.errors import ConfigError
from visionlora.ranks.structure import places_of

F64 = torch.float64
METHODS = {
    "lora": {"rank": 3, "alpha": 6.0},
    "dora": {"rank": 3, "alpha": 6.0},
    "block-lora": {"rank": 4, "blocks": 2, "dropout": 0.0},
    "block-lora-grid": {"rank": 2, "blocks": 2, "layout": "grid", "dropout": 0.0},
    "slora": {"rank": 3, "alpha": 6.0},
    "lora-xs": {"rank": 3, "alpha": 6.0},
    "lora-fa": {"rank": 3, "alpha": 6.0},
    "full": {},
    "spiel": {"count": 9},
}


def gradients(delta):
    return {name: p.grad for name, p in delta.named_parameters()}


def layer(method="lora", size=(6, 4), dtype=F64, **options):
    """Return one adapted layer away from its start, inside a model."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size)).to(dtype)
    vl.inject(model, method.removesuffix("-grid"), "0", **(METHODS[method] | options))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=dtype))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def data(count=16, size=6, dtype=F64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model):
    return lambda x: (model(x) - 1.0).square().mean()


def stepper(model, config, *others, optimizer=torch.optim.SGD, lr=0.1, **options):
    made = optimizer(trained(model), lr=lr)
    dynamics = [item.build(model, made, 10) for item in (config, *others) if item is not None]
    return Stepper(model, made, dynamics=dynamics, **options)


def place(model):
    return places_of(model)[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_measured_are_the_rows_of_the_change_and_of_its_slope(method):
    """G is the change of the weight per unit of descent; for a pair s (B gA + gB A)."""
    model = layer(method)
    loss_of(model)(data()).backward()
    delta = place(model).delta
    weight = model[0].weight.detach()
    p, q = change_and_gradient(delta, gradients(delta))
    inner = method == "dora"  # whose noise is that of V, inside the norm

    def change():
        return delta.scale * delta.B @ delta.A if inner else delta.delta(weight)

    moving = [item for name, item in delta.named_parameters() if name != "magnitude"]
    before, tiny = change().detach().clone(), 1e-6
    with torch.no_grad():
        for item in moving:
            item.sub_(tiny * item.grad)
        descent = (before - change()) / tiny
    assert_close(p, before.norm(dim=1))
    torch.testing.assert_close(q, descent.norm(dim=1), rtol=1e-4, atol=1e-8)


def test_the_scale_is_part_of_the_gradient():
    model = layer()
    loss_of(model)(data()).backward()
    delta = place(model).delta
    G = 2.0 * (delta.B @ delta.A.grad + delta.B.grad @ delta.A)
    assert_close(change_and_gradient(delta, gradients(delta))[1], G.norm(dim=1))


def test_a_constant_pair_is_taken_off():
    model = nn.Sequential(nn.Linear(6, 4)).to(F64)
    vl.inject(model, "lora", "0", rank=2, init="pissa")
    loss_of(model)(data()).backward()
    delta = place(model).delta
    change, gradient = change_and_gradient(delta, gradients(delta))
    assert float(change.max()) < 1e-7  # the root of a rounding error
    assert float(gradient.min()) > 1e-3


def test_who_takes_gradients_away_after_clipping_does_no_harm():
    class Takes(Dynamics):
        name = "takes"
        controls = True

        def on_grads_clipped(self, context):
            for parameter in context.parameters:
                parameter.grad = None

    model, other = layer(), layer()
    plain, taken = (stepper(item, GGPOConfig(), clip_norm=0.1, lr=0.0) for item in (model, other))
    taken.dynamics = (Takes(), *taken.dynamics)
    for run, item in ((plain, model), (taken, other)):
        run.step([data()], loss_of(item))
    left, right = (run.dynamics[-1].state_dict()["0.weight"] for run in (plain, taken))
    assert torch.equal(left["q"], right["q"])
    assert float(left["q"].min()) > 0


class Peek(Dynamics):
    """Notes the frozen weights at every event."""

    name = "peek"

    def __init__(self, weight):
        self.weight = weight
        self.seen = {}

    def _note(self, event):
        self.seen[event] = self.weight.detach().clone()

    def on_step_begin(self, context):
        self._note("begin")

    def penalty(self, context):
        self._note(f"forward {context.micro_batch}")

    def on_grads_clipped(self, context):
        self._note("clipped")

    def on_step_end(self, context):
        self._note("end")


def peeking(model, config, *others, **options):
    run = stepper(model, config, *others, **options)
    peek = Peek(model[0].weight)
    run.dynamics = (*run.dynamics, peek)
    return run, peek


def test_noise_lasts_from_the_first_forward_to_the_last_backward():
    model = layer()
    pristine = model[0].weight.clone()
    run, peek = peeking(model, GGPOConfig())
    run.step(list(data().split(4)), loss_of(model))
    assert all(torch.equal(item, pristine) for item in peek.seen.values())  # no noise at first
    for _ in range(2):
        run.step(list(data().split(4)), loss_of(model))
        noisy = peek.seen["begin"]
        assert not torch.equal(noisy, pristine)
        assert all(torch.equal(peek.seen[f"forward {i}"], noisy) for i in range(4))
        assert torch.equal(peek.seen["clipped"], pristine)
        assert torch.equal(model[0].weight, pristine)


def test_evaluation_between_steps_is_that_of_the_adapter_alone():
    model = layer(dtype=torch.float32)
    x = data(dtype=torch.float32)
    run = stepper(model, GGPOConfig(sigma=1.0))
    for _ in range(3):
        run.step([x], loss_of(model))
    other = layer(dtype=torch.float32)
    with torch.no_grad():
        for one, two in zip(trained(other), trained(model), strict=True):
            one.copy_(two)
    assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_without_noise_the_trajectory_is_the_plain_one(optimizer):
    plain, quiet = layer(dtype=torch.float32), layer(dtype=torch.float32)
    x = data(dtype=torch.float32)
    one = stepper(plain, None, optimizer=optimizer)
    other = stepper(quiet, GGPOConfig(sigma=0.0, beta=0.0), optimizer=optimizer)
    for _ in range(5):
        one.step([x], loss_of(plain))
        other.step([x], loss_of(quiet))
    assert same(values(plain), values(quiet))


@pytest.mark.parametrize("norm", ["fan_out", "fan_in"])
@pytest.mark.parametrize("row_exact", [True, False])
def test_the_size_of_the_noise_is_the_equation(norm, row_exact):
    model = layer(size=(40, 10))
    run = stepper(model, GGPOConfig(sigma=0.5, beta=0.4, norm=norm, row_exact=row_exact), lr=0.0)
    run.step([data(size=40)], loss_of(model))
    loss_of(model)(data(size=40)).backward()
    delta, rows = place(model).delta, model[0].weight.detach().norm(dim=1)
    G = delta.scale * (delta.B @ delta.A.grad + delta.B.grad @ delta.A)
    rows = rows if row_exact else rows.mean()
    p = torch.hypot(rows, (delta.scale * delta.B @ delta.A).detach().norm(dim=1))
    expected = (0.5 * p + 0.4 * G.norm(dim=1).square()) / (10 if norm == "fan_out" else 40) ** 0.5
    assert_close(run.dynamics[0].deviations(place(model)), expected)


def test_noise_has_that_spread_and_no_mean():
    model = layer(size=(40, 10))
    pristine = model[0].weight.detach().clone()
    run, peek = peeking(model, GGPOConfig(sigma=0.1, beta=1e-3), lr=0.0)
    x = data(size=40)
    run.step([x], loss_of(model))
    draws = []
    for _ in range(300):
        deviation = run.dynamics[0].deviations(place(model))[:, None]
        run.step([x], loss_of(model))
        draws.append((peek.seen["begin"] - pristine) / deviation)
    noise = torch.stack(draws)
    # 12000 numbers a row, 120000 in all: one deviation of these estimates is 0.65 % and 0.9 %.
    assert float((noise.transpose(0, 1).flatten(1).std(dim=1) - 1).abs().max()) < 0.03
    assert float(noise.mean(dim=(0, 2)).abs().max()) < 0.04
    assert abs(float(noise[0].flatten() @ noise[1].flatten())) / 400 < 0.2


def test_noise_passes_to_the_input_gradient():
    """y = x (W + E)^T, so the gradient of x has E in it."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).to(F64)
    vl.inject(model, "lora", "1", rank=2)
    run = stepper(model, GGPOConfig(sigma=1.0))
    x = data(size=3)
    run.step([x], loss_of(model))
    gradients = []

    def loss(x):
        h = model[0](x).detach().requires_grad_()
        total = (model[1](h) - 1.0).square().mean()
        y = torch.nn.functional.linear(h, model[1].weight, model[1].bias)
        delta = place(model).delta
        expected = y + delta.scale * h @ delta.A.T @ delta.B.T
        (found,) = torch.autograd.grad(total, h, retain_graph=True)
        (wanted,) = torch.autograd.grad((expected - 1.0).square().mean(), h)
        gradients.append((found, wanted))
        return total

    run.step([x], loss)
    assert_close(*gradients[0])


def test_the_size_of_the_noise_follows_clipped_gradients():
    found = []
    for clip_norm in (None, 1e-3):
        model = layer()
        run = stepper(model, GGPOConfig(), clip_norm=clip_norm)
        report = run.step([data()], loss_of(model))
        found.append(run.dynamics[0].state_dict()["0.weight"]["q"])
    assert_close(found[1] / found[0], torch.full((4,), 1e-3 / report.grad_norm, dtype=F64))


def test_row_slices_and_every_kind_of_layer():
    """Only rows of adapted sites are noisy, in the orientation of their view."""
    torch.default_generator.manual_seed(0)
    model = Net().to(F64)
    vl.inject(model, "lora", TARGETS, rank=2)
    pristine = values(model)
    run = stepper(model, GGPOConfig())
    seen = []

    def loss(index):
        seen.append(values(model))
        return model(index).square().mean()

    for _ in range(2):
        run.step([INDEX], loss)
    moved = {key: seen[1][key] != pristine[key] for key in pristine if "adapters" not in key}
    rows = {key: mask.flatten(1).all(1) for key, mask in moved.items() if mask.dim() > 1}
    assert rows.pop("table.weight").all()
    assert rows.pop("conv.weight").all()
    assert rows.pop("attn.out_proj.weight").all()
    assert torch.equal(rows.pop("qkv.weight"), torch.arange(24).div(8).floor() != 1)
    assert torch.equal(rows.pop("attn.in_proj_weight"), torch.arange(24) < 8)
    assert not rows
    assert not any(mask.any() for key, mask in moved.items() if mask.dim() == 1)
    after = values(model)
    assert all(torch.equal(after[key], pristine[key]) for key in moved)


def test_noise_of_an_embedding_has_a_size_per_output():
    model = nn.Sequential(nn.Embedding(400, 6)).to(F64)
    vl.inject(model, "lora", "0", rank=2)
    index = torch.arange(400)
    run, peek = peeking(model, GGPOConfig(sigma=1.0, beta=0.0), lr=0.0)
    pristine = model[0].weight.detach().clone()
    for _ in range(2):
        run.step([index], lambda i: (model(i) - 1.0).square().mean())
    spread = (peek.seen["begin"] - pristine).std(dim=0)
    expected = pristine.norm(dim=0) / 6**0.5
    assert float((spread / expected - 1).abs().max()) < 0.15


def test_the_same_seed_step_and_site_give_the_same_noise():
    def weights(seed):
        model = layer(dtype=torch.float32)
        run, peek = peeking(model, GGPOConfig(seed=seed), lr=0.0)
        found = []
        for _ in range(3):
            torch.rand(1)  # the global generator has no part in it
            run.step([data(dtype=torch.float32)], loss_of(model))
            found.append(peek.seen["begin"])
        return found

    one, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[1], one[2])
    assert not torch.equal(one[1], other[1])


def test_the_global_generator_is_untouched():
    model = layer()
    run = stepper(model, GGPOConfig())
    before = torch.get_rng_state()
    for _ in range(2):
        run.step([data()], loss_of(model))
    assert torch.equal(before, torch.get_rng_state())


def test_micro_batches_equal_one_batch():
    model = layer()
    other = copy.deepcopy(model)
    whole, parts = stepper(model, GGPOConfig()), stepper(other, GGPOConfig())
    for _ in range(4):
        whole.step([data()], loss_of(model))
        parts.step(list(data().split(4)), loss_of(other))
    for one, two in zip(trained(model), trained(other), strict=True):
        assert_close(one, two)


def test_checkpointed_regions_see_the_same_noise():
    plain, saving = layer(), layer()
    one, other = stepper(plain, GGPOConfig()), stepper(saving, GGPOConfig())

    def checkpointed(x):
        y = torch.utils.checkpoint.checkpoint(saving, x, use_reentrant=False)
        return (y - 1.0).square().mean()

    for _ in range(3):
        one.step([data()], loss_of(plain))
        other.step([data()], checkpointed)
    assert same(values(plain), values(saving))


def test_both_passes_of_glad_see_the_same_noise():
    model = layer()
    run, peek = peeking(model, GGPOConfig(), GLADConfig())
    run.step([data()], loss_of(model))
    seen = []

    def loss(x):
        seen.append(model[0].weight.detach().clone())
        return loss_of(model)(x)

    run.step([data()], loss)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], peek.seen["end"])


def test_a_skipped_step_takes_the_noise_back_and_forgets_it():
    model = layer()
    before = model[0].weight.clone()
    run = stepper(model, GGPOConfig())
    run.step([data()], loss_of(model))
    state = copy.deepcopy(run.dynamics[0].state_dict())
    assert run.step([data()], lambda x: loss_of(model)(x) * float("nan")).skipped
    assert torch.equal(model[0].weight, before)
    after = run.dynamics[0].state_dict()
    assert all(torch.equal(after["0.weight"][key], state["0.weight"][key]) for key in "pq")


def test_an_exception_takes_the_noise_back():
    model = layer()
    before = model[0].weight.clone()
    run = stepper(model, GGPOConfig())
    run.step([data()], loss_of(model))

    def fails(x):
        assert not torch.equal(model[0].weight, before)
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        run.step([data()], fails)
    assert torch.equal(model[0].weight, before)


def test_a_resumed_run_repeats_the_whole_one():
    def fresh():
        model = layer(dtype=torch.float32)
        return model, stepper(model, GGPOConfig(sigma=0.3))

    x = data(dtype=torch.float32)
    whole, run = fresh()
    for _ in range(6):
        run.step([x], loss_of(whole))
    first, half = fresh()
    for _ in range(3):
        half.step([x], loss_of(first))
    rest, again = fresh()
    rest.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    for _ in range(3):
        again.step([x], loss_of(rest))
    assert same(values(whole), values(rest))
    assert not same(values(whole), values(layer(dtype=torch.float32)))


def test_a_bfloat16_base_gets_noise_of_the_right_size():
    model = layer(size=(64, 32), dtype=torch.float32)
    model[0].weight.data = model[0].weight.data.bfloat16()
    model[0].bias.data = model[0].bias.data.bfloat16()
    x = data(size=64).bfloat16()
    run, peek = peeking(model, GGPOConfig(sigma=0.3, beta=0.0), lr=0.0)
    pristine = model[0].weight.detach().clone()
    for _ in range(2):
        run.step([x], lambda x: (model(x).float() - 1.0).square().mean())
    spread = (peek.seen["begin"].float() - pristine.float()).std(dim=1)
    p = run.dynamics[0].state_dict()["0.weight"]["p"]
    assert p.dtype == torch.float32
    assert float((spread.mean() / (0.3 * p / 32**0.5).mean() - 1).abs()) < 0.1
    assert torch.equal(model[0].weight, pristine)


def test_weights_that_cannot_carry_noise_are_refused():
    model = layer()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"weight of 0\.weight is trained"):
        GGPOConfig().build(model, optimizer, 5)
    model.to("meta")
    with pytest.raises(ConfigError, match=r"0\.weight, whose weight is on the meta device"):
        GGPOConfig().build(model, optimizer, 5)
    with pytest.raises(ConfigError, match="none is trained"):
        GGPOConfig().build(nn.Linear(2, 2), optimizer, 5)


def test_two_changes_of_one_weight_are_refused():
    model = layer()
    vl.inject(model, "lora", "0", name="other", rank=2)
    with pytest.raises(ConfigError, match=r"two changes: 0\.weight and 0\.weight share rows"):
        GGPOConfig().build(model, torch.optim.SGD(trained(model), lr=0.1), 5)


@pytest.mark.parametrize(
    "text", ["ggpo", "lora+ggpo+glad", "dora+ggpo", "spiel+ggpo", "full+ggpo+mgpo", "sam", "mgpo"]
)
def test_products_that_make_sense(text):
    recipe = vl.parse(text)
    assert recipe.dynamics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vera+ggpo", "ggpo cannot train vera: its noise is sized by"),
        ("lora+glad+sam", "glad and sam both move the parameters"),
        ("lora+mgpo+glad", "mgpo and glad both move the parameters"),
    ],
)
def test_products_that_make_none(text, message):
    with pytest.raises(ConfigError, match=message):
        vl.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -0.1}, r"ggpo: sigma must not be negative, got -0\.1"),
        ({"beta": -1.0}, "ggpo: beta must not be negative"),
        ({"norm": "rows"}, "norm must be one of 'fan_out', 'fan_in', got 'rows'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GGPOConfig(**options)
