"""PiSSA and OLoRA: the pair starts as a part of the weight, and the function does not change."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import visionlora as vl
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb, trained_names
from tests.methods.single_layer import adapt
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.layers import LoRALinear
from visionlora.methods.base import Delta
from visionlora.methods.lora import LoRA, LoRAConfig

INITS = ["pissa", "olora"]


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


LAYERS = {
    "linear": (lambda: nn.Linear(10, 14), "0", lambda: torch.randn(5, 10)),
    "slices": (lambda: nn.Linear(8, 24), "0[q,v]", lambda: torch.randn(5, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "0", lambda: torch.randn(2, 4, 5, 5)),
    "attention": (attention, "0", lambda: torch.randn(2, 5, 8)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=2), "0", lambda: torch.arange(11)),
}


def run(model, x):
    layer = model[0]
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def build(kind, dtype=torch.float64):
    torch.manual_seed(3)
    layer, target, inputs = LAYERS[kind]
    model = nn.Sequential(layer()).to(dtype)
    x = inputs()
    return model, target, x.to(dtype) if x.is_floating_point() else x


def deltas(model):
    return [module for module in model.modules() if isinstance(module, Delta)]


# -- initial values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", INITS)
def test_the_function_is_kept_on_every_kind_of_layer(init, kind, dtype):
    model, target, x = build(kind, dtype)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    expected = run(model, x)
    vl.inject(model, init, targets=target, rank=2, alpha=3.0)
    assert_close(run(model, x), expected)
    for delta in deltas(model):
        up, down = delta.factors()
        assert not (up @ down).any(), "exactly zero, not to rounding"
    for name, item in before.items():
        assert torch.equal(dict(model.named_parameters())[name], item), "the weight is not touched"


@pytest.mark.parametrize("init", INITS)
def test_the_function_is_kept_in_low_precision(init):
    """Two products of the size of the weight would leave their rounding in the output."""
    model, target, x = build("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert torch.equal(vl.inject(model, init, targets=target, rank=8)(x), expected)
    model, x = model.bfloat16(), x.bfloat16()
    with vl.disabled(model):
        expected = model(x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
@pytest.mark.parametrize("alpha", [3.0, 16.0])
def test_pissa_starts_at_the_largest_singular_triples_shared_out_evenly(shape, alpha):
    model = adapted_chain("pissa", shape, rank=4, alpha=alpha)
    delta, weight = delta_of(model[0]), model[0].weight.detach()
    values = torch.linalg.svdvals(weight)
    part = delta.scale * delta.B0 @ delta.A0
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    assert_close(part, U[:, :4] @ S[:4].diag() @ V[:4])
    left = weight - part
    assert_close(torch.linalg.matrix_norm(left, 2), values[4])
    assert_close(left.square().sum(), values[4:].square().sum())
    for gram in (delta.B0.t() @ delta.B0, delta.A0 @ delta.A0.t()):
        assert_close(gram, (values[:4] / delta.scale).diag())


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_olora_starts_at_the_first_part_of_the_qr(shape):
    model = adapted_chain("olora", shape, rank=4, alpha=6.0)
    delta, weight = delta_of(model[0]), model[0].weight.detach()
    Q, R = torch.linalg.qr(weight)
    assert_close(delta.B0 @ delta.A0, Q[:, :4] @ R[:4])
    assert_close(delta.B0.t() @ delta.B0, torch.eye(4, dtype=torch.float64))
    assert torch.equal(delta.A0, delta.A0.triu())
    assert bool((delta.A0.diagonal() > 0).all())
    assert not (weight - delta.B0 @ delta.A0)[:, :4].abs().max() > 1e-12


@pytest.mark.parametrize("init", INITS)
def test_a_slice_is_decomposed_on_its_own(init):
    whole, target, _ = build("slices")
    weight = whole[0].weight.detach().clone()
    vl.inject(whole, init, targets=target, rank=3)
    for key, rows in (("q", slice(0, 8)), ("v", slice(16, 24))):
        alone = nn.Sequential(nn.Linear(8, 8)).double()
        with torch.no_grad():
            alone[0].weight.copy_(weight[rows])
        vl.inject(alone, init, targets="0", rank=3)
        assert torch.equal(delta_of(whole[0], key).A0, delta_of(alone[0]).A0)
        assert torch.equal(delta_of(whole[0], key).B0, delta_of(alone[0]).B0)


# -- the change


@pytest.mark.parametrize("init", INITS)
def test_the_change_and_its_gradients_are_those_of_the_definition(init):
    model = disturb(adapted_chain(init, (10, 14), rank=4, alpha=6.0))
    delta = delta_of(model[0])
    A, B, A0, B0 = delta.A.detach(), delta.B.detach(), delta.A0, delta.B0
    assert_close(change_of(model[0]), 1.5 * (B @ A - B0 @ A0))
    x, goal = torch.randn(5, 10).double(), torch.randn(5, 14).double()
    (model(x) * goal).sum().backward()
    g = goal.t() @ x
    assert_close(delta.A.grad, 1.5 * B.t() @ g)
    assert_close(delta.B.grad, 1.5 * g @ A.t())
    assert delta.A0.grad is None
    assert not delta.B0.requires_grad


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", INITS)
def test_merged_ejected_and_exported_it_is_the_same_function(init, kind, tmp_path):
    model, target, x = build(kind)
    base = copy.deepcopy(model)
    vl.inject(model, init, targets=target, rank=2, alpha=3.0)
    disturb(model).eval()
    expected = run(model, x)
    assert not torch.allclose(expected, run(base, x), atol=1e-3)
    with vl.merged(model):
        assert_close(run(model, x), expected)
    report = vl.export(model, tmp_path / "plain.safetensors", format="lora")
    assert report.error == 0
    assert max(report.ranks.values()) <= 4
    plain = vl.load(copy.deepcopy(base), report).eval()
    assert all(not delta.frozen() for delta in deltas(plain))
    assert_close(run(plain, x), expected)
    assert_close(run(vl.eject(copy.deepcopy(model)), x), run(base, x))
    assert_close(run(vl.eject(model, merge=True), x), expected)


def test_squeezed_it_is_plain_lora_of_twice_the_rank():
    model = disturb(adapted_chain("pissa", (10, 14), rank=3))
    x = torch.randn(5, 10).double()
    expected = model(x)
    vl.squeeze(model, rank=6)
    assert delta_of(model[0]).A.shape == (6, 10)
    assert_close(model(x), expected)


@pytest.mark.parametrize("init", INITS)
def test_dropout_leaves_the_layer_alone_at_first(init):
    model = adapted_chain(init, (10, 14), rank=4, dropout=0.5).train()
    x = torch.randn(5, 10).double()
    assert torch.equal(model(x), chain((10, 14))(x))
    disturb(model)
    assert not torch.equal(model(x), model(x))


def test_plain_lora_keeps_its_lean_pair():
    delta = delta_of(adapted_chain("lora", (10, 14), rank=4)[0])
    up, down = delta.factors()
    assert up is delta.B
    assert down is delta.A
    assert not list(delta.buffers())
    assert delta.frozen() == {}


# -- files


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", INITS)
def test_a_file_restores_the_function(init, kind, tmp_path):
    model, target, x = build(kind)
    base = copy.deepcopy(model)
    vl.inject(model, init, targets=target, rank=2, alpha=3.0)
    disturb(model).eval()
    path = vl.save(model, tmp_path / "a.safetensors")
    assert {key.rsplit(".", 1)[-1] for key in load_file(path)} == {"A", "B", "A0", "B0"}
    assert trained_names(model) == {"A", "B"}
    assert torch.equal(run(vl.load(base, path).eval(), x), run(model, x))
    vl.load(model, path)  # a second time nothing is taken off again
    assert torch.equal(run(model, x), run(base, x))


@pytest.mark.parametrize("init", INITS)
def test_the_constant_pair_does_not_depend_on_the_machine_that_loads_it(init, tmp_path):
    model = disturb(adapted_chain(init, (8, 8), rank=3))
    path = vl.save(model, tmp_path / "a.safetensors")
    other = chain((8, 8))
    with torch.no_grad():
        other[0].weight[1] += 1e-3
    assert_close(change_of(vl.load(other, path)[0]), change_of(model[0]))


@pytest.mark.parametrize(
    ("there", "here"),
    [("pissa", "lora"), ("lora", "pissa"), ("lorat", "olora")],
)
def test_values_of_another_kind_of_start_are_refused(there, here, tmp_path):
    path = vl.save(adapted_chain(there, (8, 8), rank=3), tmp_path / "a.safetensors")
    model = adapted_chain(here, (8, 8), rank=3)
    before = {key: item.clone() for key, item in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"0\.weight has offset \d in the model and \d in"):
        vl.load(model, path)
    assert all(torch.equal(model.state_dict()[key], item) for key, item in before.items())


def test_inits_of_one_function_are_exchangeable(tmp_path):
    there, here = adapted_chain("lorat", (8, 8), rank=3), adapted_chain("lora", (8, 8), rank=3)
    x = torch.randn(4, 8, dtype=next(there.parameters()).dtype)
    assert not torch.equal(here(x), there(x))
    vl.load(here, vl.save(there, tmp_path / "a.safetensors"))
    assert torch.equal(here(x), there(x))


# -- refusals


@pytest.mark.parametrize("alpha", [0.0, -2.0])
def test_a_scale_without_a_root_is_refused(alpha):
    with pytest.raises(ConfigError, match="needs a positive alpha, got"):
        adapted_chain("pissa", (8, 8), rank=3, alpha=alpha)


def test_weights_without_a_decomposition_are_refused():
    for init, value, said in (
        ("pissa", 0.0, "weight of 0.weight is zero"),
        ("pissa", float("nan"), "weight of 0.weight holds NaN"),
        ("olora", float("inf"), "weight of 0.weight holds NaN or infinity"),
    ):
        model = chain((4, 4))
        with torch.no_grad():
            model[0].weight.fill_(value)
        with pytest.raises(ConfigError, match=said):
            vl.inject(model, init, targets="0", rank=2)
        assert type(model[0]) is nn.Linear
    with pytest.raises(ConfigError, match="rank 11"):
        adapted_chain("olora", (10, 14), rank=11)


def test_a_zero_weight_can_be_trained_from_its_qr():
    model = chain((4, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    vl.inject(model, "olora", targets="0", rank=2)
    model(torch.randn(3, 4).double()).sum().backward()
    assert bool(delta_of(model[0]).A.grad.any())


def test_layers_whose_weight_may_still_come_are_refused():
    with pytest.raises(ConfigError, match="on the finished model"):
        LoRALinear(8, 8, rank=2, init="pissa")
    with pytest.raises(ConfigError, match="init must be one of 'zero', 'normal'"):
        vl.build_config("squeeze-lora", {"init": "pissa"})


@pytest.mark.parametrize("init", INITS)
def test_the_count_is_that_of_lora(init):
    model = adapt(nn.Linear(10, 14), init, rank=4)
    expected = LoRA.parameter_count(LoRAConfig(rank=4), 14, 10)
    assert sum(item.numel() for _, item in vl.trainable_parameters(model)) == expected == 96
