"""LoRA-One: a truncated gradient step of a set length, in balanced factors."""

import pytest
import torch

import visionlora as vl
from tests.init.given import best, given, matrix, product
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.lora_one import LoRAOne

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
S = 1.5


@SHAPES
@pytest.mark.parametrize("arms", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_change_is_a_truncated_gradient_step(shape, arms, rank):
    g = matrix(*shape)
    site = given(shape, rank, "blocks", gradient=g, scale=S, arms=arms)
    largest = torch.linalg.svdvals(g)[0]
    change = S * product(LoRAOne().start(site))
    assert_close(change, -S / (128 * largest) * best(g, rank))
    assert float((change * g).sum()) < 0


@SHAPES
def test_the_factors_are_balanced(shape):
    start = LoRAOne().start(given(shape, gradient=matrix(*shape)))
    assert_close(start.up.t() @ start.up, start.down @ start.down.t())
    assert not start.taken_off


def test_several_arms_are_balanced_as_training_sees_them():
    """B, the sum of n arms, and A move as a pair `(B / sqrt n, A)` would under sqrt(n) s."""
    start = LoRAOne().start(given(gradient=matrix(12, 10), form="blocks", arms=4))
    B = start.up / 4**0.5
    assert_close(B.t() @ B, start.down @ start.down.t())


@pytest.mark.parametrize("factor", [1000.0, 1e-30])
def test_the_size_of_the_gradient_does_not_matter(factor):
    g = matrix(12, 10)
    one, other = (product(LoRAOne().start(given(gradient=k * g))) for k in (1.0, factor))
    assert_close(one, other)


def test_the_loss_goes_down_for_a_short_step():
    x, W, goal = matrix(10, 40, seed=4), matrix(12, 10, seed=1), matrix(12, 40, seed=5)

    def loss(weight):
        return float((weight @ x - goal).square().mean())

    g = 2 * (W @ x - goal) @ x.t() / goal.numel()
    site = given(weight=W, gradient=g, scale=S)
    losses = [loss(W + S * product(LoRAOne(gamma=gamma).start(site))) for gamma in (128.0, 1e4)]
    assert losses[0] < losses[1] < loss(W)


def test_impossible_options_and_gradients_are_refused():
    with pytest.raises(ConfigError, match="gamma"):
        LoRAOne(gamma=0.0)
    with pytest.raises(ConfigError, match=r"lora-one: the gradient at layer\.weight is zero"):
        LoRAOne().start(given(gradient=torch.zeros(12, 10)))


# -- in a model

X, GOAL = matrix(8, 12, seed=4), matrix(8, 9, seed=5)


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def started(method, **options):
    model = adapted_chain(method, (12, 10), (10, 9), rank=4, alpha=3.0, **options)
    report = vl.initialise(model, "lora-one", [(X, GOAL)], loss_fn, gamma=1e3)
    return model, report


METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("slora", {}), ("dora", {}), ("block-lora", {"blocks": 2, "dropout": 0.0})],
)


@METHODS
def test_a_model_starts_one_step_down(method, options):
    model, report = started(method, **options)
    base = chain((12, 10), (10, 9))
    before = loss_fn(base, (X, GOAL))
    before.backward()
    assert bool(loss_fn(model, (X, GOAL)) < before)
    for layer, plain, name in zip(model, base, ("0.weight", "1.weight"), strict=True):
        delta, g = delta_of(layer), plain.weight.grad
        up, down = delta.trained_pair()
        expected = best(g, delta.rank) / torch.linalg.svdvals(g)[0] / 1e3
        assert_close(up.detach() @ down.detach(), -expected)
        relative = delta.scale * expected.norm() / layer.weight.norm()
        assert report.change[name] == pytest.approx(float(relative))
        if method == "slora":
            assert torch.equal(delta.N.detach(), torch.eye(4, dtype=torch.float64))
        if method == "dora":  # the magnitude is that of the changed weight, which is all there is
            V = plain.weight + delta.scale * up @ down
            assert_close(delta.magnitude, V.norm(dim=1))
            assert_close(layer.weight + change_of(layer), V.detach())
        else:
            assert_close(change_of(layer), -delta.scale * expected)


@METHODS
def test_a_file_holds_all_of_it(method, options, tmp_path):
    model, _ = started(method, **options)
    disturb(model, 0.1)
    loaded = vl.load(chain((12, 10), (10, 9)), vl.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(loaded(X), model(X))
    if method != "dora":
        report = vl.export(model, tmp_path / "b.safetensors", format="lora")
        rank = 2 if method == "block-lora" else 4
        assert set(report.ranks.values()) == {rank}  # nothing was taken off
        assert_close(vl.load(chain((12, 10), (10, 9)), report)(X), model(X))


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_a_scale_that_would_turn_the_step_uphill_is_refused(alpha):
    with pytest.raises(ConfigError, match="lora-one needs a positive alpha"):
        vl.parse("lora-one").config(alpha=alpha)
