"""Gradients with a factor per row: against the formulas, in every form of the fused function."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from visionlora.ops import Branch, lora_linear, row_norms, scale_gradient, with_gain


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def branches_of(sliced, to_input):
    """Return two branches, the first with a gain, and the tensors they train."""
    sizes, rows = ((3, 4), ((0, 3), (2, 6))) if sliced else ((6, 6), (None, None))
    pairs = [
        (double(size, rank), double(rank, 5)) for size, rank in zip(sizes, (2, 1), strict=True)
    ]
    gain = double(sizes[0], grad=False).abs() + 0.5
    first = Branch(*pairs[0], 0.7, rows[0], "", gain, to_input)
    return [first, Branch(*pairs[1], -1.3, rows[1])], [item for pair in pairs for item in pair]


def plain(x, weight, bias, branches, z):
    """The same through autograd's own products."""
    y = F.linear(x, weight, bias)
    for up, down, scale, rows, _, gain, to_input in branches:

        def thin(z, up, down):
            return z @ down.t() @ up.t()

        part = scale * with_gain(thin, x if z is None else z, up, down, gain, to_input)
        start, stop = rows or (0, y.shape[-1])
        y = y + F.pad(part, (start, y.shape[-1] - stop))
    return y


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_gradients_equal_the_formulas(separate, sliced, to_input):
    torch.default_generator.manual_seed(0)
    x, weight, bias = double(4, 5), double(6, 5), double(6)
    z = double(4, 5) if separate else None
    branches, factors = branches_of(sliced, to_input)
    upstream = double(4, 6, grad=False)
    for function in (lora_linear, plain):
        inputs = [x, *factors] + ([] if z is None else [z])
        y = function(x, weight, bias, branches, z)
        grad_x, up0, down0, up1, down1, *grad_z = torch.autograd.grad((y * upstream).sum(), inputs)
        source = x if z is None else z
        (B0, A0, s0, rows0, _, a, _), (B1, A1, s1, rows1, *_) = branches
        g0, g1 = upstream[:, slice(*rows0 or (0, 6))], upstream[:, slice(*rows1 or (0, 6))]
        G0 = s0 * g0.t() @ source
        assert_close(up0, a[:, None] * G0 @ A0.t())
        assert_close(down0, B0.t() @ (a[:, None] * G0))
        assert_close(up1, s1 * g1.t() @ source @ A1.t())
        assert_close(down1, s1 * B1.t() @ g1.t() @ source)
        seen = s0 * (g0 * a if to_input else g0) @ B0 @ A0 + s1 * g1 @ B1 @ A1
        base = upstream @ weight
        assert_close(grad_x, base + seen if z is None else base)
        for item in grad_z:
            assert_close(item, seen)


@pytest.mark.parametrize("frozen", ["x", "down", "up"])
def test_gradients_of_a_part_are_those_of_the_whole(frozen):
    torch.default_generator.manual_seed(1)
    x, weight = double(4, 5), double(6, 5, grad=False)
    branches, factors = branches_of(False, False)
    fixed = {"x": [x], "up": factors[0::2], "down": factors[1::2]}[frozen]
    wanted = [t for t in [x, *factors] if not any(t is item for item in fixed)]
    upstream = double(4, 6, grad=False)
    y = lora_linear(x, weight, None, branches)
    expected = torch.autograd.grad((y * upstream).sum(), wanted)
    for item in fixed:
        item.requires_grad_(False)
    y = lora_linear(x, weight, None, branches)
    found = torch.autograd.grad((y * upstream).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("to_input", [False, True])
def test_second_derivatives_are_those_of_the_scaled_gradients(to_input, separate):
    torch.default_generator.manual_seed(2)
    branches, factors = branches_of(True, to_input)
    tensors = [double(3, 5), double(6, 5), double(6), double(3, 5) if separate else None, *factors]

    def call(x, weight, bias, z, *flat):
        pairs = zip(flat[0::2], flat[1::2], strict=True)
        own = [
            item._replace(up=up, down=down)
            for item, (up, down) in zip(branches, pairs, strict=True)
        ]
        return lora_linear(x, weight, bias, own, z)

    assert torch.autograd.gradgradcheck(call, tensors)


def test_scaling_a_gradient_keeps_the_value_and_can_be_differentiated_twice():
    torch.default_generator.manual_seed(3)
    x, gain = double(4, 3), double(3, grad=False)
    y = scale_gradient(x, gain)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert_close(gradient, 2 * gain * x)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert_close(second, 2 * (gain * gain).expand(4, 3))


@pytest.mark.parametrize("fold", [1, 3])
def test_row_norms_are_those_of_the_product(fold):
    torch.default_generator.manual_seed(4)
    up, down = double(7, 3), double(3, 5)
    norms = row_norms(up, down, fold)
    assert_close(norms, (up @ down.repeat(1, fold)).norm(dim=1))
    assert not norms.requires_grad
    assert bool((row_norms(torch.zeros_like(up), down) == 0).all())


def test_row_norms_are_taken_in_full_precision_under_autocast():
    torch.default_generator.manual_seed(5)
    up, down = torch.randn(7, 3), torch.randn(3, 50)
    with torch.autocast("cpu", torch.bfloat16):
        norms = row_norms(up, down)
    assert norms.dtype == torch.float32
    assert_close(norms, (up @ down).norm(dim=1))
