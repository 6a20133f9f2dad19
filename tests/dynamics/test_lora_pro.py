"""LoRA-Pro: pairs move as the weight would; heads, order, scale and saving make no difference."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.ranks.planted import Problem
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.lora_plus import LoRAPlusConfig
from visionlora.dynamics.lora_pro import LoRAProConfig
from visionlora.dynamics.sam import SAMConfig
from visionlora.errors import ConfigError, VisionLoraError
from visionlora.ranks.structure import places_of
from visionlora.training import RunDirectory, TrainSettings, fit

WIDTH, OUT = 6, 6


def exactly(**options):
    """LoRA-Pro without regularisation, for identities."""
    return LoRAProConfig(ridge=0.0, **options)


class Net(nn.Module):
    """Two layers of other shapes, whose order of registration may be turned round."""

    def __init__(self, turned=False, head=False):
        super().__init__()
        names = ["last", "first"] if turned else ["first", "last"]
        for name in names:
            shape = {"first": (WIDTH, 7), "last": (7, OUT)}[name]
            self.add_module(name, nn.Linear(*shape))
        if head:
            self.head = nn.Linear(OUT, OUT, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def network(**options):
    torch.default_generator.manual_seed(0)
    net = Net(**options).double()
    values = Net().double()
    values.load_state_dict({k: normal(*v.shape, seed=i) for i, (k, v) in enumerate(shapes())})
    net.load_state_dict(values.state_dict(), strict=False)
    return net


def shapes():
    return Net().state_dict().items()


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / max(shape[-1], 1) ** 0.5


def adapted(method="lora", net=None, seeded=True, **options):
    """Return the network with an adapter; with `seeded` every pair starts at random values."""
    model = vl.inject(network() if net is None else net, method, ["first", "last"], **options)
    if seeded:
        for place in places_of(model):
            with torch.no_grad():
                start = len(place.path)  # other values at every site, whatever their order
                place.delta.A.copy_(normal(*place.delta.A.shape, seed=start))
                place.delta.B.copy_(normal(*place.delta.B.shape, seed=start + 100))
    return model


DATA = normal(32, WIDTH, seed=11) * WIDTH**0.5
TARGETS = normal(32, OUT, seed=12) * OUT**0.5


def loss_of(model):
    return lambda rows: (model(DATA[rows]) - TARGETS[rows]).square().mean()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def trainer(model, config, lr=1e-2, optimizer=torch.optim.AdamW, weight_decay=0.0, **options):
    optimiser = optimizer(trained(model), lr=lr, weight_decay=weight_decay)
    return Stepper(model, optimiser, dynamics=[config.build(model, optimiser, 100)], **options)


def train(model, config, steps=4, **options):
    stepper = trainer(model, config, **options)
    for _ in range(steps):
        stepper.step([slice(None)], loss_of(model))
    return stepper


def weights(model):
    """Return the weight that every adapted layer has with its change."""
    return {
        place.path: place.host.view(place.key)
        + place.host.state.strengths[place.adapter] * place.delta.delta(place.host.view(place.key))
        for place in places_of(model)
    }


def assert_same_weights(one, other, factor=1.0):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for path, weight in one.items():
        assert_close(weight.detach(), other[path].detach(), factor)


def gradients_of_weights(model):
    """Return dL/dW of the merged model, by layer."""
    plain = network()
    for path, weight in weights(model).items():
        plain.get_submodule(path).weight.data.copy_(weight.detach())
    loss_of(plain)(slice(None)).backward()
    return {path: plain.get_submodule(path).weight.grad for path in weights(model)}


def full_training(reference, kind, lr, steps):
    """Train the weights of a plain network that starts where an adapted one does."""
    plain = network()
    for path, weight in weights(reference).items():
        plain.get_submodule(path).weight.data.copy_(weight.detach())
    plain.requires_grad_(False)
    own = [plain.get_submodule(path).weight.requires_grad_() for path in weights(reference)]
    optimizer = kind(own, lr=lr, **({"weight_decay": 0.0} if kind is torch.optim.AdamW else {}))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(plain)(slice(None)).backward()
        optimizer.step()
    return plain


# -- against training of the weight


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


# -- what must make no difference


def test_order_of_layers_and_another_trainable_head_change_nothing():
    """The head comes first in the optimiser and trains on what does not reach back."""
    one = adapted(rank=2)
    other = adapted(rank=2, net=network(turned=True, head=True))
    head = other.head.weight.requires_grad_()
    first = head.detach().clone()

    def loss(rows):
        outputs = other(DATA[rows])
        aside = other.head(outputs.detach()).square().mean()
        return (outputs - TARGETS[rows]).square().mean() + aside

    train(one, exactly(), steps=3)
    optimizer = torch.optim.AdamW([head, *trained(other)[:-1]], lr=1e-2, weight_decay=0.0)
    stepper = Stepper(other, optimizer, dynamics=[exactly().build(other, optimizer, 3)])
    for _ in range(3):
        stepper.step([slice(None)], loss)
    orders = [[place.path for place in places_of(model)] for model in (one, other)]
    assert orders[0] == orders[1][::-1]
    assert_same_weights(one, other)
    assert set(optimizer.state) == {head}
    assert not torch.equal(head, first)


def test_accumulated_micro_batches_are_one_step():
    one, other = adapted(rank=2), adapted(rank=2)
    steppers = [trainer(model, exactly(), clip_norm=0.05) for model in (one, other)]
    for _ in range(3):
        steppers[0].step([slice(None)], loss_of(one))
        steppers[1].step([slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32)], loss_of(other))
    assert_same_weights(one, other, factor=10)


def test_arms_move_as_their_sum():
    """The weight of n arms on one block moves as that of plain LoRA with the same scale."""
    block = adapted("block-lora", rank=4, blocks=2, alpha=2.0, dropout=0.0)
    plain = adapted(rank=2, alpha=2.0)
    for left, right in zip(places_of(block), places_of(plain), strict=True):
        with torch.no_grad():
            right.delta.A.copy_(left.delta.A)
            right.delta.B.copy_(left.delta.trained_pair()[0])
        assert left.delta.scale == right.delta.scale
    for config in (exactly(), exactly(moments="factor"), exactly(moments="none")):
        models = [copy.deepcopy(block), copy.deepcopy(plain)]
        for model in models:
            train(model, config, steps=3)
        assert_same_weights(*models)


def test_strength_of_an_adapter_is_part_of_its_scale():
    one, other = adapted(rank=2, alpha=6.0), adapted(rank=2, alpha=2.0)
    vl.set_scale(other, 3.0)
    for model in (one, other):
        train(model, exactly(), steps=3)
    assert_same_weights(one, other)


def test_a_constant_pair_is_no_part_of_the_step():
    one = adapted(rank=2)
    other = vl.inject(network(), "lora", ["first", "last"], rank=2, init="pissa")
    for left, right in zip(places_of(one), places_of(other), strict=True):
        with torch.no_grad():
            left.delta.A.copy_(right.delta.A)
            left.delta.B.copy_(right.delta.B)
            left.host.store(left.key, left.host.view(left.key) - right.delta.B0 @ right.delta.A0)
    assert_same_weights(one, other)
    for model in (one, other):
        train(model, exactly(), steps=3)
    assert_same_weights(one, other)


def test_the_rate_is_that_of_the_group():
    model = adapted(rank=2)
    stepper = trainer(model, exactly())
    before = {path: weight.detach() for path, weight in weights(model).items()}
    stepper.optimizer.param_groups[0]["lr"] = 0.0
    stepper.step([slice(None)], loss_of(model))
    assert all(torch.equal(weight, before[path]) for path, weight in weights(model).items())


def test_the_optimizer_has_no_state_of_the_pairs():
    model = adapted(rank=2)
    assert not train(model, exactly()).optimizer.state


@pytest.mark.parametrize("moments", ["full", "factor", "none"])
def test_state_round_trip_continues_bit_for_bit(moments):
    config = LoRAProConfig(moments=moments, warm_b_steps=1)
    whole = adapted(rank=2, seeded=False)
    train(whole, config, steps=5)
    model = adapted(rank=2, seeded=False)
    stepper = train(model, config, steps=2)
    saved = copy.deepcopy(stepper.state_dict())
    again = adapted(rank=2, seeded=False)
    again.load_state_dict(model.state_dict())
    stepper = trainer(again, config)
    stepper.load_state_dict(saved)
    for _ in range(3):
        stepper.step([slice(None)], loss_of(again))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_skipped_step_changes_no_pair_and_no_moment():
    model = adapted(rank=2)
    stepper = train(model, exactly(), steps=2)
    before = copy.deepcopy((stepper.state_dict()["dynamics"], trained(model)))
    report = stepper.step([slice(None)], lambda rows: loss_of(model)(rows) * float("nan"))
    assert report.skipped
    after = stepper.state_dict()["dynamics"]["lora-pro"]
    assert after["steps"] == before[0]["lora-pro"]["steps"]
    moments = before[0]["lora-pro"]["moments"]
    assert after["moments"]["steps"] == moments["steps"]
    for key in ("first", "second"):
        for name, value in moments[key].items():
            assert torch.equal(value, after["moments"][key][name])
    assert all(torch.equal(*pair) for pair in zip(trained(model), before[1], strict=True))


def test_gradients_of_a_failed_step_are_forgotten():
    model = adapted(rank=2)
    twin = copy.deepcopy(model)
    stepper, other = trainer(model, exactly()), trainer(twin, exactly())
    stepper.optimizer.step = lambda: (_ for _ in ()).throw(OSError("power cut"))
    with pytest.raises(OSError, match="power cut"):
        stepper.step([slice(None)], loss_of(model))
    del stepper.optimizer.step
    stepper.optimizer.zero_grad()
    for one, model_ in ((stepper, model), (other, twin)):
        one.step([slice(None)], loss_of(model_))
    assert_same_weights(model, twin)


def test_float32_moments_beside_a_half_precision_model():
    model = vl.inject(network().bfloat16(), "lora", ["first", "last"], rank=2)
    stepper = trainer(model, LoRAProConfig(), lr=1e-3)
    loss = lambda rows: (model(DATA.bfloat16()).float() - TARGETS.float()).square().mean()  # noqa: E731
    stepper.step([slice(None)], loss)
    state = stepper.state_dict()["dynamics"]["lora-pro"]["moments"]
    moments = [item for key in ("first", "second") for item in state[key].values()]
    assert {item.dtype for item in moments} == {torch.float32}
    assert {item.shape for item in moments} == {(7, 6), (6, 7)}


def test_a_large_weight_is_walked_through_in_blocks(monkeypatch):
    """How many rows are worked on at once does not matter."""
    one, other = adapted(rank=2), adapted(rank=2)
    train(one, exactly(), steps=2)
    monkeypatch.setattr("visionlora.dynamics.moments._BLOCK", 2 * WIDTH)
    train(other, exactly(), steps=2)
    assert_same_weights(one, other)


def run(folder, dies_at=None, resume=False):
    problem = Problem(noise=0.2, examples=24)
    model = problem.model("lora", rank=2)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.1)
    dynamics = LoRAProConfig(warm_b_steps=1).build(model, optimizer, 6)

    def batches(step):
        if step == dies_at:
            raise OSError("power cut")
        return problem.batches(step)

    settings = TrainSettings(steps=6, device="cpu", checkpoint_every=1, log_every=6)
    where = RunDirectory(folder, resume=resume)
    fit(model, optimizer, problem.loss, batches, settings, where, dynamics=[dynamics])
    return model


def test_a_run_that_died_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "part", dies_at=4)
    again = run(tmp_path / "part", resume=True)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# -- what is refused


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dora", {"rank": 2}, "cannot train dora"),
        ("slora", {"rank": 2}, "cannot train slora"),
        ("lora-fa", {"rank": 2}, "'projected'"),
        ("lora-xs", {"rank": 2}, "'projected'"),
        ("full", {}, "cannot train full"),
        ("lora", {"rank": 2, "dropout": 0.1}, "dropout=0"),
        ("lora", {"rank": 2, "alpha": 0.0}, "divides by the scale"),
        ("block-lora", {"layout": "grid", "dropout": 0.0}, "layout 'grid'"),
    ],
)
def test_methods_without_a_free_linear_pair_are_refused(method, options, reason):
    targets = "first" if method == "block-lora" else ["first", "last"]
    model = vl.inject(network(), method, targets, **options)
    with pytest.raises(ConfigError, match=reason):
        trainer(model, LoRAProConfig())


@pytest.mark.parametrize(
    ("other", "reason"),
    [(LoRAPlusConfig(), "another rate for B"), (SAMConfig(), "at another point")],
)
def test_dynamics_that_change_the_gradient_are_refused(other, reason):
    config = adapted(rank=2).first.adapters.default["weight"].config
    with pytest.raises(ConfigError, match=reason):
        LoRAProConfig().check(config, [other])


def test_factors_of_different_rates_are_refused():
    model = adapted(rank=2)
    groups = [{"params": [p], "lr": 0.1 * (1 + i)} for i, p in enumerate(trained(model))]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(ConfigError, match="one learning rate"):
        LoRAProConfig().build(model, optimizer, 1)


@pytest.mark.parametrize(
    "options",
    [{"beta1": 1.0}, {"eps": -1.0}, {"ridge": -1.0}, {"warm_b_steps": -1}, {"choice": "x"}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="lora-pro"):
        LoRAProConfig(**options)


def test_a_state_of_another_model_is_refused():
    saved = train(adapted(rank=2), LoRAProConfig(), steps=1).state_dict()
    only = vl.inject(network(), "lora", "last", rank=2)
    with pytest.raises(VisionLoraError, match="another model"):
        trainer(only, LoRAProConfig()).load_state_dict(saved)
