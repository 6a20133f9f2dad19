"""LoRA-SB: the sign step of AdamW, truncated, and gradient descent within its bases."""

import pytest
import torch

import visionlora as vl
from tests.init.given import best, given, matrix, product
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb, trained_names
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.lora_sb import LoRASB

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])


def site(g, rank=3, scale=1.0, weight=None):
    return given(tuple(g.shape), rank, "core", gradient=g, scale=scale, weight=weight)


@SHAPES
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_change_is_the_best_part_of_the_sign_step(shape, scale, rank):
    g = matrix(*shape)
    start = LoRASB(lr=1e-3).start(site(g, rank, scale))
    change = scale * product(start)
    assert_close(1e3 * change, best(-g.sign(), rank))
    eye = torch.eye(rank, dtype=torch.float64)
    assert_close(start.up.t() @ start.up, eye)
    assert_close(start.down @ start.down.t(), eye)
    assert float((change * g).sum()) < 0
    assert 0 < float(change.norm()) <= 1e-3 * g.numel() ** 0.5
    assert not start.taken_off


def test_at_full_rank_it_is_the_first_step_of_adamw():
    g = matrix(9, 7)
    weight = torch.nn.Parameter(matrix(9, 7, seed=2))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0, eps=1e-16)
    weight.grad = g
    optimizer.step()
    start = LoRASB(lr=1e-3).start(site(g, 7))
    assert_close(1e3 * product(start), 1e3 * (weight.detach() - before))


def test_warm_up_divides_the_step():
    g = matrix(12, 10)
    whole, warm = (product(LoRASB(warmup_steps=n).start(site(g))) for n in (1, 40))
    assert_close(1e4 * whole, 4e5 * warm)


@pytest.mark.parametrize("factor", [1000.0, 1e-30])
def test_only_the_signs_matter(factor):
    g = matrix(12, 10)
    one, other = (LoRASB().start(site(item)) for item in (g, factor * g))
    for a, b in ((one.up, other.up), (one.core, other.core), (one.down, other.down)):
        assert torch.equal(a, b)


def loss(weight, x, goal):
    return (weight @ x - goal).square().mean()


@pytest.mark.parametrize("rank", [1, 4])
def test_the_loss_goes_down_on_the_batches_it_was_estimated_from(rank):
    x, goal, W = matrix(10, 40, seed=4), matrix(12, 40, seed=5), matrix(12, 10, seed=1)
    g = 2 * (W @ x - goal) @ x.t() / goal.numel()
    change = product(LoRASB(lr=1e-3).start(site(g, rank, weight=W)))
    before = loss(W, x, goal)
    gain = before - loss(W + change, x, goal)
    assert float(gain) > 0
    # the other way it goes up by as much, to first order
    assert_close(loss(W - change, x, goal) - before, gain, factor=1e8)


def test_the_first_step_of_gradient_descent_is_the_gradient_within_the_bases():
    x, goal, W = matrix(10, 40, seed=4), matrix(12, 40, seed=5), matrix(12, 10, seed=1)
    g = 2 * (W @ x - goal) @ x.t() / goal.numel()
    start = LoRASB(lr=1e-3).start(site(g, weight=W))
    core = start.core.clone().requires_grad_()
    weight = W + start.up @ core @ start.down
    loss(weight, x, goal).backward()
    residual = (weight.detach() @ x - goal) @ x.t()
    here = 2 * residual / goal.numel()
    assert_close(core.grad, start.up.t() @ here @ start.down.t())
    step = -start.up @ core.grad @ start.down
    P_B, P_A = start.up @ start.up.t(), start.down.t() @ start.down
    assert_close(step, -P_B @ here @ P_A)
    # no other step within the bases is closer to full gradient descent
    basis = torch.stack(
        [start.up[:, i : i + 1] @ start.down[j : j + 1] for i in range(3) for j in range(3)]
    ).flatten(1)
    closest = torch.linalg.lstsq(basis.t(), -here.flatten()[:, None]).solution
    assert_close((basis.t() @ closest).reshape(12, 10), step)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": -1.0}, {"warmup_steps": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LoRASB(**options)


def test_a_gradient_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"lora-sb: the gradient at layer\.weight is zero"):
        LoRASB().start(site(torch.zeros(12, 10)))


# -- in a model


def batches():
    return [(matrix(n, 12, seed=n), matrix(n, 9, seed=n + 20)) for n in (4, 7, 2)]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def started(order=1, factor=1.0, **options):
    model = adapted_chain("lora-xs", (12, 10), (10, 9), rank=4, **options)
    scaled = lambda model, batch: factor * loss_fn(model, batch)  # noqa: E731
    vl.initialise(model, "lora-sb", batches()[::order], scaled, lr=1e-3)
    return model


def total(model):
    whole = tuple(torch.cat(items) for items in zip(*batches(), strict=True))
    return loss_fn(model, whole)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_a_model_starts_below_its_loss(alpha):
    model, base = started(alpha=alpha), chain((12, 10), (10, 9))
    assert trained_names(model) == {"R"}
    total(base).backward()
    assert bool(total(model) < total(base))
    for layer, plain in zip(model, base, strict=True):
        assert_close(1e3 * change_of(layer), best(-plain.weight.grad.sign(), 4))
        assert float((change_of(layer) * plain.weight.grad).sum()) < 0


@pytest.mark.parametrize("other", [{"order": -1}, {"factor": 1000.0}])
def test_neither_order_nor_scale_of_the_loss_changes_the_start(other):
    for one, two in zip(started(), started(**other), strict=True):
        assert_close(1e3 * change_of(one), 1e3 * change_of(two))


def test_the_bases_go_into_files_because_only_the_data_know_them(tmp_path):
    model = disturb(started(), 0.1)
    x = matrix(5, 12, seed=9)
    loaded = vl.load(chain((12, 10), (10, 9)), vl.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(delta_of(loaded[0]).B, delta_of(model[0]).B)
    report = vl.export(model, tmp_path / "b.safetensors", format="lora")
    assert set(report.ranks.values()) == {4}
    assert_close(vl.load(chain((12, 10), (10, 9)), report)(x), model(x))


def test_a_sketch_and_other_methods_are_refused():
    model = adapted_chain("lora-xs", (12, 10), (10, 9), rank=4)
    with pytest.raises(ConfigError, match="lora-sb needs whole gradients"):
        vl.initialise(model, "lora-sb", batches(), loss_fn, sketch=6)
    for method in ("lora", "slora", "dora"):
        model = adapted_chain(method, (12, 10), (10, 9), rank=4)
        with pytest.raises(ConfigError, match=f"lora-sb cannot start {method}"):
            vl.initialise(model, "lora-sb", batches(), loss_fn)
