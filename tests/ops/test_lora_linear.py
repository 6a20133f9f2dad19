"""The fused function: every derivative against finite differences, every form of input."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from visionlora.ops import Branch, lora_linear


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def reference(x, weight, bias, branches, z=None):
    y = F.linear(x, weight, bias)
    for up, down, scale, rows, *_ in branches:
        part = scale * ((x if z is None else z) @ down.t() @ up.t())
        start, stop = rows or (0, y.shape[-1])
        y = y + F.pad(part, (start, y.shape[-1] - stop))
    return y


def arguments(separate, bias, sliced):
    x, weight = double(2, 3, 5), double(6, 5)
    z = double(2, 3, 4) if separate else None
    width = 4 if separate else 5
    rows = ((0, 3), (2, 6)) if sliced else (None, None)
    sizes = (3, 4) if sliced else (6, 6)
    factors = [
        (double(size, rank), double(rank, width)) for size, rank in zip(sizes, (2, 1), strict=True)
    ]
    b = double(6) if bias else None

    def call(function, x, weight, b, z, *flat):
        pairs = list(zip(flat[0::2], flat[1::2], strict=True))
        branches = [
            Branch(up, down, scale, where)
            for (up, down), scale, where in zip(pairs, (0.7, -1.3), rows, strict=True)
        ]
        return function(x, weight, b, branches, z)

    return call, (x, weight, b, z, *itertools.chain(*factors))


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_first_and_second_derivatives(separate, bias, sliced):
    call, tensors = arguments(separate, bias, sliced)
    assert_close(call(lora_linear, *tensors), call(reference, *tensors))
    assert torch.autograd.gradcheck(lambda *t: call(lora_linear, *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: call(lora_linear, *t), tensors)


@pytest.mark.parametrize("frozen", ["x", "weight", "up", "down", "base", "factors"])
def test_derivatives_of_a_part_are_those_of_the_whole(frozen):
    call, tensors = arguments(False, True, True)
    x, weight, bias, _, up0, down0, up1, down1 = tensors
    fixed = {
        "x": [x],
        "weight": [weight, bias],
        "up": [up0, up1],
        "down": [down0, down1],
        "base": [x, weight, bias],
        "factors": [up0, down1],
    }[frozen]
    wanted = [t for t in tensors if t is not None and not any(t is item for item in fixed)]
    upstream = double(2, 3, 6, grad=False)
    expected = torch.autograd.grad((call(reference, *tensors) * upstream).sum(), wanted)
    for item in fixed:
        item.requires_grad_(False)
    output = call(lora_linear, *tensors)
    actual = torch.autograd.grad((output * upstream).sum(), wanted, create_graph=True)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    # and once more: a gradient penalty sees the same second derivatives
    penalty = sum(item.square().sum() for item in actual)
    plain = torch.autograd.grad(
        (call(reference, *tensors) * upstream).sum(), wanted, create_graph=True
    )
    expected = torch.autograd.grad(
        sum(item.square().sum() for item in plain), wanted, allow_unused=True
    )
    again = torch.autograd.grad(penalty, wanted, allow_unused=True)
    for one, other, item in zip(again, expected, wanted, strict=True):
        zero = torch.zeros_like(item)
        assert_close(zero if one is None else one, zero if other is None else other)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 5), (2, 0, 5), (2, 3, 1, 5)])
def test_any_batch_shape(shape):
    x, weight, up, down = double(*shape), double(6, 5), double(6, 2), double(2, 5)
    branches = [Branch(up, down, 0.5)]
    y, expected = lora_linear(x, weight, None, branches), reference(x, weight, None, branches)
    assert y.shape == expected.shape
    assert_close(y, expected)
    wanted = [x, up, down]
    for one, other in zip(
        torch.autograd.grad(y.sum(), wanted),
        torch.autograd.grad(expected.sum(), wanted),
        strict=True,
    ):
        assert_close(one, other)


def test_transposed_inputs_and_gradients():
    x, weight, up, down = double(5, 4).t(), double(5, 6).t(), double(2, 6).t(), double(5, 2).t()
    branches = [Branch(up, down, 0.5)]
    upstream = double(6, 4, grad=False).t()
    y, expected = lora_linear(x, weight, None, branches), reference(x, weight, None, branches)
    assert_close(y, expected)
    for one, other in zip(
        torch.autograd.grad((y * upstream).sum(), [x, up, down]),
        torch.autograd.grad((expected * upstream).sum(), [x, up, down]),
        strict=True,
    ):
        assert_close(one, other)
    expanded = torch.autograd.grad(lora_linear(x, weight, None, branches).sum(), [up])[0]
    assert_close(expanded, torch.autograd.grad(reference(x, weight, None, branches).sum(), [up])[0])


def test_inputs_are_not_written_to():
    call, tensors = arguments(True, True, True)
    before = [None if item is None else item.detach().clone() for item in tensors]
    call(lora_linear, *tensors).sum().backward()
    for item, kept in zip(tensors, before, strict=True):
        assert kept is None or torch.equal(item.detach(), kept)


def test_half_precision_factors_are_cast_once_and_get_float32_gradients():
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.bfloat16)
    up, down = torch.randn(6, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    y = lora_linear(x, weight, None, [Branch(up, down, 0.5)])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (x.grad.dtype, up.grad.dtype, down.grad.dtype) == (torch.bfloat16, *[torch.float32] * 2)


def test_autocast_leaves_float64_alone_as_torch_does():
    x, weight, up, down = double(3, 5), double(6, 5), double(6, 2), double(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, None, [Branch(up, down, 0.5)])
        assert y.dtype == F.linear(x, weight).dtype == torch.float64
