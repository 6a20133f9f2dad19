"""RandLoRA: rank, counts, shared bases, the function that scales them."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.rand_lora import RandLoRA, RandLoRAConfig, _ScaledBases, number_of_bases


def adapt(*shapes, seed=0, **options):
    """Return a list of adapted Linears of `(in, out)`, with random trainables."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(*shape) for shape in shapes]).double()
    vl.inject(model, "rand-lora", targets="type:Linear", seed=seed, **options)
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.copy_(torch.randn_like(item))
    return model


def delta_of(layer):
    return layer.adapters["default"]["weight"]


def change(layer):
    return delta_of(layer).delta(layer.weight).detach()


@pytest.mark.parametrize("layout", ["paper", "peft"])
def test_the_change_has_full_rank(layout):
    model = adapt((12, 20), (20, 12), (16, 16), rank=4, layout=layout)
    for index, full in enumerate((12, 12, 16)):
        assert int(torch.linalg.matrix_rank(change(model[index]))) == full
        if layout == "paper":  # there, one basis fewer leaves the rank (N - 1) r
            with torch.no_grad():
                delta_of(model[index]).Lambda[:, 0] = 0
            assert int(torch.linalg.matrix_rank(change(model[index]))) == full - 4


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_the_product_is_the_sum_over_bases(shape):
    rank = 4  # does not divide 10
    model = adapt(shape, rank=rank, alpha=6.0)
    delta, bases = delta_of(model[0]), model.visionlora_shared["default"]
    expected = torch.zeros(14, 10, dtype=torch.float64)
    for n in range(3):
        B = bases.B[:, n * rank : (n + 1) * rank]
        expected += 1.5 * B @ (delta.Lambda[:, n, None] * bases.A * delta.Gamma[n])
    assert_close(change(model[0]), expected if shape == (10, 14) else expected.t())


@pytest.mark.parametrize("layout", ["paper", "peft"])
def test_the_scaled_bases_keep_only_their_inputs_and_have_their_gradients(layout):
    torch.manual_seed(1)
    A = torch.randn(3, 5, dtype=torch.float64)
    Lambda = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    Gamma = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        V = _ScaledBases.apply(A, Lambda, Gamma, layout)
    assert {item.data_ptr() for item in kept} == {item.data_ptr() for item in (A, Lambda, Gamma)}
    order = "nkj" if layout == "paper" else "knj"
    assert_close(V, torch.einsum(f"kn,kj,nj->{order}", Lambda, A, Gamma))

    def scaled(Lambda, Gamma):
        return _ScaledBases.apply(A, Lambda, Gamma, layout)

    assert torch.autograd.gradcheck(scaled, (Lambda, Gamma))
    assert torch.autograd.gradgradcheck(scaled, (Lambda, Gamma))


@pytest.mark.parametrize(("init", "moving"), [("lambda", "Lambda"), ("gamma", "Gamma")])
def test_at_first_only_the_zero_diagonal_moves(init, moving):
    model = nn.Sequential(nn.Linear(8, 12)).double()
    vl.inject(model, "rand-lora", targets="0", rank=4, init=init)
    delta = delta_of(model[0])
    assert not bool(change(model[0]).any())
    constant = {"lambda": delta.Gamma, "gamma": delta.Lambda}[init]
    expected = {"lambda": 1 / 8, "gamma": 1 / 4}[init]
    assert_close(constant, torch.full_like(constant, expected))
    model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    for name, item in delta.named_parameters():
        assert bool(item.grad.any()) is (name == moving)


def test_tall_and_wide_sites_share_one_pair_and_slices_train():
    model = nn.ModuleDict(
        {
            "fc1": nn.Linear(8, 32),
            "fc2": nn.Linear(32, 8),
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
        }
    )
    vl.inject(model, "rand-lora", targets=["fc1", "fc2", "attention[q,k,v,out]"], rank=3)
    bases = model.visionlora_shared["default"]
    assert bases.A.shape == (3, 32)  # the smaller of the largest out (32) and in (32)
    assert bases.B.shape == (32, number_of_bases(3, 32) * 3)
    assert not list(bases.parameters())
    x = torch.randn(2, 5, 8)
    y = model["attention"](x, x, x, need_weights=False)[0]
    model["fc2"](model["fc1"](y)).square().sum().backward()
    for name, item in vl.trainable_parameters(model):
        if name.endswith("Lambda"):
            assert bool(item.grad.any()), name


def test_counts():
    def count(shapes, rank):
        config = RandLoRAConfig(rank=rank)
        return sum(RandLoRA.parameter_count(config, out, width) for out, width in shapes)

    assert count([(768, 768)], 32) == 19_200
    assert count([(768, 768)] * 24, 32) == 460_800
    assert count([(768, 768)], 6) == 99_072
    assert count([(3072, 768)], 32) == count([(768, 3072)], 32) == 19_200
    model = adapt((10, 14), rank=4)
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == 3 * (4 + 10)


@pytest.mark.parametrize(
    ("bases", "zeros"), [("dense", 0), ("sparse", 2 / 3), ("very-sparse", 1 - 1 / 8)]
)
def test_bases_have_unit_variance_and_their_share_of_zeros(bases, zeros):
    shared = adapt((64, 96), rank=16, bases=bases).visionlora_shared["default"]
    for item in (shared.A, shared.B):
        assert abs(float(item.std()) - 1) < 0.1
        assert abs(float((item == 0).double().mean()) - zeros) < 0.05
        if zeros:
            assert len(item.unique()) == 3
    other = adapt((64, 96), rank=16, bases=bases, seed=1).visionlora_shared["default"]
    assert not torch.equal(shared.A, other.A)


def test_an_embedding_never_forms_the_table():
    model = nn.Sequential(nn.Embedding(50, 8, padding_idx=2))
    vl.inject(model, "rand-lora", targets="0", rank=4)
    delta = delta_of(model[0])
    with torch.no_grad():
        delta.Lambda.normal_()
    up, down = delta.factors()
    assert up.shape == (8, 8)
    bases = model.visionlora_shared["default"]
    assert down.untyped_storage().data_ptr() == bases.B.untyped_storage().data_ptr()
    assert_close(delta.scale * up @ down, delta.delta(model[0].weight.t()))


def test_wrong_options_are_refused():
    for options, message in [
        ({"rank": 0}, "at least 1"),
        ({"rank": 9}, r"rank 9.*8 x 12.*at most 8"),
        ({"dropout": 1.0}, "dropout"),
        ({"layout": "other"}, "'paper', 'peft'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapt((12, 8), **{"rank": 2, **options})


def test_the_presets_scales():
    assert adapt((8, 8), rank=4)[0].adapters["default"]["weight"].scale == 20.0
    model = nn.Sequential(nn.Linear(8, 8))
    vl.inject(model, "rand-lora-clip", targets="0", rank=4)
    assert delta_of(model[0]).scale == 0.25
