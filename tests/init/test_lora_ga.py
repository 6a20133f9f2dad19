"""LoRA-GA: the first step is the best step of rank 2r, whatever the split, size and sign."""

import pytest
import torch

import visionlora as vl
from tests.init.given import best, given, matrix
from tests.methods.chains import adapted_chain, chain, delta_of
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.init.lora_ga import LoRAGA

SHAPES = pytest.mark.parametrize("shape", [(12, 10), (9, 14)])
SPLITS = pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
S, GAMMA = 1.5, 64.0


def start_of(g, rank=3, arms=1, **options):
    options = {"norm_clip": False, **options}
    form = "blocks" if arms > 1 else "pair"
    site = given(tuple(g.shape), rank, form, gradient=g, scale=S, arms=arms)
    return LoRAGA(**options).start(site)


def first_step(g, up, down, arms=1):
    """Return the first-order change of the weight per unit of minus the learning rate.

    Every arm gets the same gradient, so all of them together move `arms` times as far.
    """
    return S * (up @ (S * up.t() @ g)) + S * arms * (S * g @ down.t()) @ down


@SHAPES
@SPLITS
def test_the_first_step_is_the_best_of_twice_the_rank(shape, direction):
    g = matrix(*shape)
    start = start_of(g, direction=direction)
    expected = S**2 * shape[0] ** 0.5 / GAMMA * best(g, 6)
    assert_close(first_step(g, start.up, start.down), expected)
    assert float(expected.abs().max()) > 0.1
    assert start.taken_off


def test_a_split_that_overlaps_has_a_worse_first_step():
    g = matrix(12, 10)
    U, _, V = torch.linalg.svd(g, full_matrices=False)
    disjoint = start_of(g, scale="unit")
    left = (g - first_step(g, disjoint.up, disjoint.down) / S**2).norm()
    # the best length for the overlapping one: it moves twice along each of r directions
    left_both = (g - first_step(g, U[:, :3], V[:3]) / S**2 / 2).norm()
    assert float(left_both) > 1.2 * float(left)
    assert_close(left, torch.linalg.svdvals(g)[6:].norm())


@SPLITS
def test_the_exact_step_has_a_second_order_term(direction):
    g, lr = matrix(12, 10), 0.3
    start = start_of(g, direction=direction)
    A, B = start.down, start.up
    gA, gB = S * B.t() @ g, S * g @ A.t()
    moved = S * (B - lr * gB) @ (A - lr * gA) - S * B @ A
    assert_close(moved, -lr * first_step(g, B, A) + lr**2 * S * gB @ gA)
    assert float((lr**2 * S * gB @ gA).norm()) > 0.01


@SHAPES
@pytest.mark.parametrize("arms", [2, 3])
def test_several_arms_take_the_same_first_step(shape, arms):
    g = matrix(*shape)
    start = start_of(g, arms=arms)
    expected = S**2 * shape[0] ** 0.5 / GAMMA * best(g, 6)
    assert_close(first_step(g, start.up, start.down, arms), expected)
    # with the pair of a single arm, the half that B moves is weighted `arms` times
    plain = start_of(g)
    assert not torch.allclose(first_step(g, plain.up, plain.down, arms), expected, rtol=0.1)


@pytest.mark.parametrize("factor", [1000.0, -1.0, 1e-30, 1e30])
@SPLITS
def test_neither_size_nor_sign_of_the_gradient_matters(direction, factor):
    g = matrix(12, 10)
    one, other = (start_of(item, direction=direction) for item in (g, factor * g))
    assert_close(first_step(g, one.up, one.down), first_step(g, other.up, other.down))
    # the factors themselves are the same up to a sign per rank
    for a, b in ((one.up, other.up), (one.down.t(), other.down.t())):
        assert_close(a * (a * b).sum(0).sign(), b)


@pytest.mark.parametrize(
    ("scale", "c"),
    [
        ("stable", 12**0.25 / 8),
        ("unit", 1.0),
        ("gd", 1 / S),
        ("weightS", (torch.linalg.svdvals(matrix(12, 10, seed=1))[:3] / S).sqrt().mean()),
    ],
)
def test_the_size_of_the_factors(scale, c):
    start = start_of(matrix(12, 10), scale=scale)
    eye = c**2 * torch.eye(3, dtype=torch.float64)
    assert_close(start.up.t() @ start.up, eye)
    assert_close(start.down @ start.down.t(), eye)


def test_gamma_divides_the_first_step():
    g = matrix(12, 10)
    near, far = (start_of(g, gamma=gamma) for gamma in (16.0, 64.0))
    ratio = first_step(g, near.up, near.down) / 4
    assert_close(ratio, first_step(g, far.up, far.down))


@pytest.mark.parametrize("arms", [1, 2])
def test_the_clip_keeps_the_pair_within_the_weight(arms):
    g = matrix(12, 10)
    small = 0.001 * matrix(12, 10)
    site = given(rank=3, form="blocks", gradient=g, scale=S, arms=arms, weight=small)
    clipped = LoRAGA().start(site)
    free = LoRAGA(norm_clip=False).start(site)
    off = S * clipped.up @ clipped.down
    ratio = float((clipped.up.norm() / free.up.norm()) ** 2)
    assert 0 < ratio < 0.2
    assert_close(S * ratio * free.up @ free.down, off)
    assert_close(clipped.down, ratio**0.5 * free.down)
    assert_close(off.abs().max(), small.abs().max())
    # the direction of the first step is still that of the best one
    step = first_step(g, clipped.up, clipped.down, arms)
    assert_close(step, ratio * S**2 * 12**0.5 / GAMMA * best(g, 6))


def test_the_clip_leaves_what_is_small_enough():
    g = matrix(12, 10)
    large = given(gradient=g, weight=100 * matrix(12, 10))
    zero = given(gradient=g, weight=torch.zeros(12, 10, dtype=torch.float64))
    for site in (large, zero):
        clipped, free = LoRAGA().start(site), LoRAGA(norm_clip=False).start(site)
        assert torch.equal(clipped.up, free.up)
        assert torch.equal(clipped.down, free.down)


def test_the_random_split_follows_the_seed():
    g = matrix(12, 10)
    first, again, other = (
        LoRAGA(direction="random").start(given(gradient=g, seed=seed)) for seed in (0, 0, 3)
    )
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.down, other.down)


def test_a_gradient_of_low_rank_is_no_obstacle():
    g = matrix(12, 2) @ matrix(2, 10)
    start = start_of(g)
    assert_close(first_step(g, start.up, start.down), S**2 * 12**0.5 / GAMMA * g)


@SHAPES
def test_twice_the_rank_must_fit(shape):
    start_of(matrix(*shape), rank=min(shape) // 2)
    with pytest.raises(ConfigError, match=rf"rank 6 .* layer\.weight .* at most {min(shape) // 2}"):
        start_of(matrix(*shape), rank=6)


@pytest.mark.parametrize(
    ("g", "said"),
    [
        (torch.zeros(12, 10), "gradient at layer.weight is zero, .* give it random values"),
        (torch.full((12, 10), float("nan")), "holds NaN or infinity"),
        (torch.full((12, 10), float("inf")), "holds NaN or infinity"),
        (None, r"initialise\(model, 'lora-ga', batches, loss_fn\)"),
    ],
)
def test_a_gradient_without_a_direction_is_refused(g, said):
    with pytest.raises(ConfigError, match=said):
        LoRAGA().start(given(gradient=g))


@pytest.mark.parametrize(
    "options", [{"gamma": 0.0}, {"gamma": -1.0}, {"direction": "BrA2r"}, {"scale": "big"}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LoRAGA(**options)


# -- in a model


def batches():
    return [(matrix(n, 12, seed=n), matrix(n, 9, seed=n + 20)) for n in (4, 7, 2)]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def full_gradients(*shapes):
    """Return the gradient of the mean loss over all samples at the frozen weights."""
    model = chain(*shapes)
    whole = [torch.cat(items) for items in zip(*batches(), strict=True)]
    loss_fn(model, whole).backward()
    return [layer.weight.grad for layer in model]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 3, "alpha": 4.5}),
        ("lora", {"rank": 3, "alpha": 2.0, "scaling": "rslora"}),
        ("block-lora", {"rank": 6, "blocks": 2, "alpha": 2.0, "dropout": 0.0}),
    ],
)
@SPLITS
def test_one_step_of_a_model_is_the_best_step_of_twice_the_rank(method, options, direction):
    shapes, lr = ((12, 10), (10, 9)), 1e-3
    model = adapted_chain(method, *shapes, **options)
    report = vl.initialise(
        model, "lora-ga", batches(), loss_fn, direction=direction, norm_clip=False
    )
    assert set(report.change.values()) == {0.0}
    whole = tuple(torch.cat(items) for items in zip(*batches(), strict=True))
    assert_close(torch.tensor(report.loss), loss_fn(chain(*shapes), whole).detach().float())
    parameters = [item for _, item in vl.trainable_parameters(model)]
    loss_fn(model, whole).backward()
    deltas = [delta_of(layer) for layer in model]
    seconds = []
    for delta in deltas:
        gB = delta.B.grad.unflatten(1, (delta.arms, -1)).sum(1)
        seconds.append(lr**2 * delta.scale * gB @ delta.A.grad)
    torch.optim.SGD(parameters, lr=lr).step()
    for layer, delta, g, second in zip(
        model, deltas, full_gradients(*shapes), seconds, strict=True
    ):
        step = delta.delta(layer.weight).detach() - second
        s = delta.scale
        expected = -lr * s**2 * len(g) ** 0.5 / GAMMA * best(g, 6)
        assert_close(1e3 * step, 1e3 * expected)
        assert float(second.abs().max()) > 1e-12


def test_a_head_of_zeros_starts_nothing():
    model = chain((12, 10), (10, 9))
    with torch.no_grad():
        model[1].weight.zero_()
    vl.inject(model, "lora", targets="0", rank=2)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"gradient of 0\.weight is exactly zero"):
        vl.initialise(model, "lora-ga", batches(), loss_fn)
    assert all(torch.equal(model.state_dict()[name], item) for name, item in before.items())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("slora", {}, "cannot start slora"),
        ("lora-xs", {}, "cannot start lora-xs"),
        ("lora", {"dropout": 0.1}, "set dropout=0"),
        ("lora", {"alpha": -1.0}, "needs a positive alpha"),
        ("lora", {"rank": 5}, r"rank 5 is larger than 1\.weight allows.* at most 4"),
    ],
)
def test_methods_that_it_cannot_start_are_refused(method, options, said):
    model = adapted_chain(method, (12, 10), (10, 9), **{"rank": 2, **options})
    with pytest.raises(ConfigError, match=said) as caught:
        vl.initialise(model, "lora-ga", batches(), loss_fn)
    assert "\n" not in str(caught.value)
