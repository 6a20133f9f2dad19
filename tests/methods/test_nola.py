"""NOLA: bases that are generated and never stored."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError
from visionlora.methods.nola import NOLA, NOLAConfig
from visionlora.ops import generated

COMBINE, PROJECT = generated.combine_generated, generated.project_generated


def adapt(*shapes, seed=0, **options):
    """Return a chain of adapted Linears of `(in, out)`."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).double()
    vl.inject(model, "nola", targets="type:Linear", seed=seed, **{"rank": 2, **options})
    return model


@torch.no_grad()
def disturb(model):
    for _, item in vl.trainable_parameters(model):
        item.add_(torch.randn_like(item))
    return model


def delta_of(model, index=0):
    return model[index].adapters["default"]["weight"]


def change(model, index=0):
    return delta_of(model, index).delta(model[index].weight).detach()


# -- the function


def stream(terms, height, width, seed, bound=1.0):
    """Return the whole stream as one tensor."""
    draws = torch.empty(terms, height, width)
    return draws.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_the_combination_is_that_of_the_stored_bases_whatever_the_chunk(chunk):
    bases = stream(7, 3, 5, seed=11, bound=0.5)
    coefficients = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    result = COMBINE(coefficients, 3, 5, 11, chunk, 0.5)
    assert_close(result, torch.einsum("si,iab->sab", coefficients, bases))
    g = torch.randn_like(result)
    (found,) = torch.autograd.grad(result, coefficients, g)
    assert_close(found, torch.einsum("sab,iab->si", g, bases))


def test_first_and_second_derivatives():
    coefficients = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def combine(c):
        return COMBINE(c, 3, 2, 4, 2, 1.0).square()

    def project(m):
        return PROJECT(m, 5, 4, 2, 1.0).square()

    for function, item in ((combine, coefficients), (project, matrices)):
        assert torch.autograd.gradcheck(function, (item,))
        assert torch.autograd.gradgradcheck(function, (item,))


def test_the_library_accepts_the_operators():
    c = torch.randn(2, 5, requires_grad=True)
    m = torch.randn(2, 3, 2, requires_grad=True)
    for operator, inputs in ((COMBINE, (c, 3, 2, 4, 2, 1.0)), (PROJECT, (m, 5, 4, 2, 1.0))):
        found = torch.library.opcheck(operator, inputs)
        assert set(found.values()) == {"SUCCESS"}


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


def test_no_step_ever_holds_the_bases():
    rank, width, terms, chunk = 2, 40, 64, 4
    model = adapt((width, width), rank=rank, coefficients=terms, chunk=chunk)
    x = torch.randn(3, width, dtype=torch.float64)
    with Largest() as largest:
        model(x).square().sum().backward()
    # the bases would be 64 * 2 * 40 numbers; the largest tensor is the weight's size
    assert largest.entries <= max(chunk * rank * width, width * width) < terms * rank * width
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        COMBINE(torch.randn(2, 5, requires_grad=True), 3, 2, 4, 2, 1.0)
    assert not kept
    tensors = [*model.parameters(), *model.buffers()]
    assert max(item.numel() for item in tensors) == width * width


# -- the method


def test_the_factors_are_those_of_the_readme():
    model = disturb(adapt((6, 10), coefficients=5, alpha=3.0))
    delta, shared = delta_of(model), model.visionlora_shared["default"]
    A = stream(5, 2, 6, shared.streams["bases_A_6"].seed)
    B = stream(5, 10, 2, shared.streams["bases_B_10"].seed)
    down = delta.A0 + torch.einsum("i,iab->ab", delta.alpha, A)
    up = torch.einsum("i,iab->ab", delta.beta, B)
    assert_close(change(model), 1.5 * up @ down)


def test_at_first_the_change_is_zero_and_beta_moves():
    model = adapt((6, 10), coefficients=5)
    assert not bool(change(model).any())
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    assert bool(delta_of(model).beta.grad.any())
    assert not bool(delta_of(model).alpha.grad.any())


def test_without_the_fixed_part_zero_coefficients_are_a_dead_saddle():
    model = adapt((6, 10), coefficients=5)
    with torch.no_grad():
        delta_of(model).A0.zero_()
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    assert not any(bool(item.grad.any()) for _, item in vl.trainable_parameters(model))


def test_the_sizes_of_the_bases():
    down = {}
    for basis in ("plain", "unit", "legacy"):
        model = adapt((6, 10), coefficients=9, basis=basis)
        delta = delta_of(model)
        with torch.no_grad():
            delta.alpha.fill_(1.0)
        down[basis] = (delta.factors()[1] - delta.A0).detach()
        assert delta.zero_at_init is (basis != "legacy")
    assert_close(down["unit"].float(), down["plain"] / 3)  # drawn as float32
    assert_close(down["legacy"].float(), down["plain"] / 12**0.5)
    legacy = adapt((6, 10), coefficients=9, basis="legacy")
    assert bool(change(legacy).any())
    assert float(delta_of(legacy).beta[0].detach()) == pytest.approx(1 / 9)


@pytest.mark.parametrize("shape", [(4, 9), (30, 5)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_count_depends_on_neither_rank_nor_shape(shape, rank):
    model = adapt(shape, rank=rank, coefficients=5)
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 10
    assert 24 * NOLA.parameter_count(NOLAConfig(), *shape) == 49_152


def test_sites_of_one_width_share_a_stream_and_one_pass(monkeypatch):
    model = disturb(adapt((6, 6), (6, 6), (6, 6), coefficients=5))
    passes = []
    pieces = generated._pieces
    monkeypatch.setattr(generated, "_pieces", lambda *a: passes.append(a) or pieces(*a))
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    assert len(passes) == 4  # A and B, forward and backward
    model(x).square().sum().backward()  # accumulation: the factors are still the same
    assert len(passes) == 6
    passes.clear()
    disturb(model)
    y = x
    for layer in list(model)[:3]:  # each region runs again in the backward, the streams do not
        y = checkpoint(layer, y, use_reentrant=False)
    y.square().sum().backward()
    assert len(passes) == 4
    one, two = delta_of(model, 0), delta_of(model, 1)
    with torch.no_grad():
        two.alpha.copy_(one.alpha)
        two.beta.copy_(one.beta)
        two.A0.copy_(one.A0)
    assert torch.equal(change(model, 0), change(model, 1))
    own = adapt((6, 6), (6, 6), coefficients=5, share_basis=False)
    for delta in (delta_of(own, 0), delta_of(own, 1)):
        with torch.no_grad():
            delta.A0.zero_()
            delta.alpha.fill_(1.0)
            delta.beta.fill_(1.0)
    assert not torch.allclose(change(own, 0), change(own, 1))


def test_many_steps_equal_a_fresh_model_at_every_step():
    """What a stream keeps between calls is never out of date."""
    model = disturb(adapt((6, 8), (8, 6), coefficients=5))
    x = torch.randn(3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD([item for _, item in vl.trainable_parameters(model)], lr=1e-3)
    for _ in range(3):
        fresh = copy.deepcopy(model)
        expected = fresh(x)
        expected.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        for _ in range(2):  # accumulation: the second backward adds the same again
            model(x).square().sum().backward()
        theirs = dict(vl.trainable_parameters(fresh))
        for name, item in vl.trainable_parameters(model):
            assert_close(item.grad, 2 * theirs[name].grad)
        optimizer.step()
        optimizer.zero_grad()


def test_checkpointed_layers_and_copies():
    model = disturb(adapt((6, 8), (8, 6), coefficients=5))
    x = torch.randn(3, 6, dtype=torch.float64)
    tensors = [item for _, item in vl.trainable_parameters(model)]
    expected = torch.autograd.grad(model(x).square().sum(), tensors)
    y = checkpoint(model[0], x, use_reentrant=False)
    y = checkpoint(model[1], y, use_reentrant=False)
    for one, two in zip(torch.autograd.grad(y.square().sum(), tensors), expected, strict=True):
        assert_close(one, two)
    twin = pickle.loads(pickle.dumps(model))
    stream_of_twin = twin.visionlora_shared["default"].streams["bases_A_6"]
    assert stream_of_twin.users[0][0] is delta_of(twin)


def test_files_hold_coefficients_only_and_recognise_another_stream(tmp_path):
    model = disturb(adapt((6, 8), (8, 6), coefficients=5))
    path = vl.save(model, tmp_path / "nola.safetensors")
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).double()
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    vl.load(plain, path)
    for index in (0, 1):
        assert torch.equal(change(plain, index), change(model, index))
    other = adapt((6, 8), (8, 6), coefficients=5, seed=1)
    with pytest.raises(AdapterFileError, match="seeded tensor"):
        vl.load(other, path, check_base=False)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    COMBINE(torch.ones(1, 5), 3, 2, 4, 2, 1.0)
    PROJECT(torch.ones(1, 3, 2), 5, 4, 2, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_options_are_refused():
    for name in ("coefficients", "chunk", "rank"):
        with pytest.raises(vl.errors.ConfigError, match=f"{name} must be at least 1"):
            adapt((6, 8), **{name: 0})
