"""A linear sketch of a sum of gradients."""

import torch
from torch import nn

import visionlora as vl
from tests.init.looking import cross_entropy, tower, vectors
from tests.tolerances import assert_close
from visionlora.init.sketch import Sketch
from visionlora.init.stats import collect
from visionlora.sites import Site


def gradients(model, batches, **options):
    found = collect(model, batches, cross_entropy, needs={"gradient"}, **options)
    return {name: stats.gradient for name, stats in found.sites.items()}


def assert_same(found, expected):
    for name, value in expected.items():
        assert_close(found[name], value)


def sketched(matrices, columns, name="layer"):
    site = Site("", "weight", "linear", *matrices[0].shape)
    sketch = Sketch(site, name, columns, matrices[0].dtype)
    for matrix in matrices:
        sketch.add(matrix, 1.0)
    return sketch.result()


def test_a_sketch_returns_what_has_its_rank():
    matrix = torch.randn(40, 5).double() @ torch.randn(5, 60).double()
    assert_close(sketched([matrix], 6), matrix)


def test_a_sketch_of_a_sum_is_the_sum_of_sketches_in_any_order():
    parts = [torch.randn(30, 20).double() for _ in range(3)]
    assert_close(sketched(parts, 4), sketched([sum(parts)], 4))
    assert_close(sketched(parts[::-1], 4), sketched(parts, 4))


def test_a_sketch_keeps_the_leading_directions():
    U = torch.linalg.qr(torch.randn(96, 6).double()).Q
    V = torch.linalg.qr(torch.randn(80, 6).double()).Q
    noise = torch.randn(96, 80).double()
    matrix = 20 * U @ V.t() + 0.01 * noise / torch.linalg.matrix_norm(noise, 2)
    left, values, _ = torch.linalg.svd(sketched([matrix], 24))
    exact_left, exact_values, _ = torch.linalg.svd(matrix)
    cosines = torch.linalg.svdvals(left[:, :6].t() @ exact_left[:, :6])
    assert cosines.min() > 0.9999
    assert torch.allclose(values[:6], exact_values[:6], rtol=1e-3)


def test_sketched_gradients_are_those_of_the_mean_loss():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    vl.inject(model, "lora", "0", rank=2)
    x, y = torch.randn(5, 64).double(), torch.randint(0, 3, (5,))
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    # Five samples make a gradient of rank five at most, which a sketch of eight holds exactly.
    assert_same(gradients(model, batches, sketch=8), gradients(model, batches))
    assert_same(gradients(model, batches[::-1], sketch=8), gradients(model, batches))


def test_a_sketch_that_saves_nothing_is_not_made():
    model = tower()
    assert_same(gradients(model, vectors(), sketch=4), gradients(model, vectors()))
