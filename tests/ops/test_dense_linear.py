"""A layer whose whole weight changes: against plain autograd, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visionlora as vl
from tests.saved import saved_bytes
from tests.tolerances import assert_close
from visionlora.ops import Change, changed_weight, dense_linear

TOKENS, OUT, IN = 9, 6, 4


def product(weight, a, b):
    """Return a change that depends on the weight: `W * (b a)`."""
    return weight * (b @ a)


def tensors(*shapes):
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def case(rows=None):
    x, weight, bias, a, b = tensors(
        (TOKENS, IN), (OUT, IN), (OUT,), (2, IN), (3 if rows else OUT, 2)
    )
    return x, weight, bias, Change(product, (a, b), 0.7, rows)


@pytest.mark.parametrize("rows", [None, (1, 4)])
def test_output_and_gradients_equal_plain_autograd(rows):
    x, weight, bias, change = case(rows)
    sources = [x, weight, bias, *change.tensors]
    expected = F.linear(x, changed_weight(weight, [change], [change.tensors]), bias)
    actual = dense_linear(x, weight, bias, [change])
    assert_close(actual, expected)
    g = torch.randn_like(actual)
    for one, other in zip(
        torch.autograd.grad(actual, sources, g),
        torch.autograd.grad(expected, sources, g),
        strict=True,
    ):
        assert_close(one, other)


def test_first_and_second_derivatives_are_right():
    x, weight, bias, change = case((1, 4))

    def call(x, weight, bias, a, b):
        return dense_linear(x, weight, bias, [change._replace(tensors=(a, b))])

    inputs = (x, weight, bias, *change.tensors)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_nothing_is_kept_but_the_input():
    x, weight, bias, change = case()
    layer = nn.ParameterList([weight, bias, *change.tensors])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return dense_linear(x, weight.detach(), None, [change])

    model = Model()
    assert saved_bytes(model, lambda: model(x)) <= (x.numel() + weight.numel()) * x.element_size()


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_contractions_equal_the_dense_gradient(method):
    def gradients(mode):
        torch.manual_seed(0)
        model = vl.inject(
            nn.Linear(5, 7).double(), method, targets="type:Linear", rank=2, mode=mode
        )
        with torch.no_grad():
            for _, item in vl.trainable_parameters(model):
                item.add_(torch.randn_like(item))
        x = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
        model(x).square().sum().backward()
        return [x.grad, *(item.grad for _, item in vl.trainable_parameters(model))]

    for one, other in zip(gradients("auto"), gradients("dense"), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("zero", [False, True], ids=["overwritten", "zero magnitude"])
def test_the_gradient_of_a_magnitude_does_not_need_the_output(zero):
    """A reader may overwrite the output in place, and a magnitude of zero leaves none."""

    def gradients(reader, mode="auto"):
        torch.manual_seed(0)
        layer = vl.inject(
            nn.Linear(5, 7).double(), "dora", targets="type:Linear", rank=2, mode=mode
        )
        delta = layer.adapters["default"]["weight"]
        with torch.no_grad():
            delta.B.normal_()
            if zero:
                delta.magnitude[2] = 0.0
        x = torch.randn(20, 5, dtype=torch.float64)
        reader(layer(x)).square().sum().backward()
        return delta.magnitude.grad

    expected = gradients(F.relu, "dense")
    assert bool(expected.any())
    assert_close(gradients(lambda y: y.relu_()), expected)
    assert_close(gradients(F.relu), expected)
