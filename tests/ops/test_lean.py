"""Functions that keep what their input is made of, and not the input: the same derivatives."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from visionlora.ops import Branch, Change, Rebuilt, dense_linear, lora, lora_linear

OUT, IN, RANK = 6, 5, 2


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def fold(x):
    return x.unflatten(-1, (5, -1)).sum(-2)


def through_lora(x, weight, up, down, rebuilt):
    branches = [Branch(up, down, 0.7), Branch(up[2:5], down, -1.3, (1, 4))]
    return lora_linear(x, weight, None, branches, None, rebuilt)


def through_folded(x, weight, up, down, rebuilt):
    branch = Branch(up, down[:, :1], 0.7)
    if rebuilt is not None:
        make = rebuilt.make
        rebuilt = Rebuilt(rebuilt.origin, lambda origin: fold(make(origin)))
    return lora_linear(x, weight, None, [branch], fold(x), rebuilt)


def through_dense(x, weight, up, down, rebuilt):
    change = Change(lambda weight, up, down: weight * (up @ down), (up, down), 0.5)
    return dense_linear(x, weight, None, [change], rebuilt)


def through_frozen_up(x, weight, up, down, rebuilt):
    branch = Branch(up, down, 0.7, None, "up")
    return lora_linear(x, weight, None, [branch], None, rebuilt)


PATHS = [through_lora, through_folded, through_dense, through_frozen_up]
MAKERS = [F.gelu, lambda z: F.layer_norm(z, (IN,), torch.linspace(-1, 2, IN, dtype=z.dtype))]


@pytest.fixture(autouse=True)
def _any_rank_is_large(monkeypatch):
    monkeypatch.setattr(lora, "_LARGE_RANK", 1)


def case():
    return double(2, 4, IN), double(OUT, IN), double(OUT, RANK), double(RANK, IN)


@pytest.mark.parametrize("make", MAKERS, ids=["gelu", "norm"])
@pytest.mark.parametrize("path", PATHS)
def test_derivatives_equal_those_of_a_kept_input(path, make):
    tensors = case()
    tensors[2].requires_grad_(path is not through_frozen_up)

    def lean(origin, *rest):
        return path(make(origin), *rest, Rebuilt(origin, make))

    y, plain = lean(*tensors), path(make(tensors[0]), *tensors[1:], None)
    assert torch.equal(y, plain)
    upstream = torch.randn_like(y)
    wanted = [item for item in tensors if item.requires_grad]
    for one, other in zip(
        torch.autograd.grad(y, wanted, upstream, retain_graph=True),
        torch.autograd.grad(plain, wanted, upstream),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert torch.autograd.gradcheck(lean, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lean, tensors, fast_mode=True)


@pytest.mark.parametrize("path", PATHS)
def test_the_origin_is_kept_and_the_input_is_not(path):
    origin, weight, up, down = case()
    weight.requires_grad_(False)
    up.requires_grad_(path is not through_frozen_up)
    x = F.gelu(origin)
    kept = set()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    )
    with hooks:
        path(x, weight, up, down, Rebuilt(origin, F.gelu))
    assert origin.data_ptr() in kept
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_made_again_where_nothing_is_trained(path):
    origin, *rest = (item.detach() for item in case())
    origin.requires_grad_()

    def refuse(origin):
        raise AssertionError("made again")

    x = F.gelu(origin)
    path(x, *rest, Rebuilt(origin, refuse)).sum().backward()
    expected = torch.autograd.grad(path(F.gelu(origin), *rest, None).sum(), origin)[0]
    assert_close(origin.grad, expected)
