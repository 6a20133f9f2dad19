"""Layers to build with: the plain layer plus LoRA, in a model that acts like an injected one."""

import copy
import pickle

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, TargetError
from visionlora.layers import LoRAConv2d, LoRAEmbedding, LoRALinear, LoRAMultiheadAttention

LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), LoRALinear.from_linear, lambda: (torch.randn(3, 8),)),
    "conv": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1),
        LoRAConv2d.from_conv2d,
        lambda: (torch.randn(2, 4, 7, 7),),
    ),
    "embedding": (
        lambda: nn.Embedding(11, 6, padding_idx=0),
        LoRAEmbedding.from_embedding,
        lambda: (torch.tensor([[0, 3, 10]]),),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        LoRAMultiheadAttention.from_attention,
        lambda: (torch.randn(2, 5, 8),) * 3,
    ),
}


def output(layer, inputs):
    found = layer(*inputs)
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def disturb(model):
    for _, item in vl.trainable_parameters(model):
        item.add_(torch.randn_like(item))
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_built_from_another_shares_its_weights_and_adds_lora(kind):
    build, convert, inputs = LAYERS[kind]
    plain, x = build(), inputs()
    hooks, keys = len(plain._forward_pre_hooks), list(plain.state_dict())
    layer = convert(plain, rank=2, seed=3)
    assert isinstance(layer, type(plain))
    assert_close(output(layer, x), output(plain, x))
    shared = dict(layer.named_parameters())
    assert all(shared[name] is item for name, item in plain.named_parameters())
    assert list(plain.state_dict()) == keys
    assert len(plain._forward_pre_hooks) == hooks
    disturb(layer)
    changed = output(layer, x)
    assert not torch.allclose(changed, output(plain, x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(output(twin, x), changed)
    with vl.merged(layer):
        assert_close(output(layer, x), changed)
    vl.eject(layer)
    assert type(layer) is type(plain)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("kind", LAYERS)
def test_an_injected_layer_computes_the_same(kind):
    build, convert, inputs = LAYERS[kind]
    plain, x = build(), inputs()
    built = disturb(convert(copy.deepcopy(plain), rank=2, seed=3))
    pattern = {"attention": "type:MultiheadAttention[q,v]"}.get(
        kind, f"type:{type(plain).__name__}"
    )
    injected = vl.inject(plain, "lora", targets=pattern, rank=2)
    vl.load_adapter_state_dict(injected, vl.adapter_state_dict(built))
    assert torch.equal(output(injected, x), output(built, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_only_a_plain_layer_of_the_right_type_is_taken(kind):
    build, convert, _ = LAYERS[kind]
    for wrong in (nn.LayerNorm(4), convert(build(), rank=2)):
        with pytest.raises(TargetError):
            convert(wrong, rank=2)
    with pytest.raises(ConfigError):
        convert(build(), rank=500)
    with pytest.raises((ConfigError, TypeError)):
        convert(build(), rank=2, rnk=2)


def test_new_layers_take_the_arguments_of_the_plain_ones():
    made = [
        (LoRALinear(8, 12, bias=False, rank=2), (torch.randn(3, 8),)),
        (LoRAConv2d(4, 6, 3, 2, padding=1, rank=2), (torch.randn(2, 4, 7, 7),)),
        (LoRAEmbedding(11, 6, 0, rank=2), (torch.tensor([1, 2]),)),
        (LoRAMultiheadAttention(8, 2, rank=2, projections="qkv"), (torch.randn(5, 2, 8),) * 3),
    ]
    for layer, x in made:
        plain = vl.eject(copy.deepcopy(layer))
        assert_close(output(layer, x), output(plain, x))
        assert {name.split(".")[0] for name, _ in vl.trainable_parameters(layer)} == {"adapters"}
    with pytest.raises(TargetError, match="'z'"):
        LoRAMultiheadAttention(8, 2, projections=["q", "z"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoRALinear(4, 4, rnk=2), "did you mean 'rank'"),
        (lambda: LoRALinear.from_linear(nn.Linear(4, 4), rnk=2), "did you mean 'rank'"),
        (
            lambda: LoRAEmbedding.from_embedding(nn.Embedding(5, 4), rank=2, dropout=0.1),
            "dropout cannot act on the layer",
        ),
    ],
)
def test_options_that_an_injected_adapter_refuses_are_refused_here(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_one_projection_may_be_named_alone():
    layer = LoRAMultiheadAttention(8, 2, rank=2, projections="out")
    assert list(layer.adapters["default"]) == ["out"]


def test_numbers_follow_the_global_seed_unless_one_is_given():
    def factor(global_seed, **options):
        torch.manual_seed(global_seed)
        layer = LoRALinear(8, 8, rank=2, **options)
        return layer.adapters["default"]["weight"].A.detach()

    assert torch.equal(factor(1), factor(1))
    assert not torch.equal(factor(1), factor(2))
    assert torch.equal(factor(1, seed=5), factor(2, seed=5))


class Small(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        if adapted:
            self.one = LoRALinear.from_linear(self.one, rank=2)
            self.two = LoRALinear.from_linear(self.two, rank=2, alpha=8.0)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()))


def test_a_model_built_of_layers_trains_saves_and_loads_into_a_plain_one(tmp_path):
    model, x = Small(adapted=True), torch.randn(16, 6)
    vl.freeze_base(model, train="head")
    optimizer = torch.optim.SGD([item for _, item in vl.trainable_parameters(model)], lr=0.1)
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    path = vl.save(model, tmp_path / "a.safetensors")
    for fresh in (Small(adapted=False), Small(adapted=True)):
        assert not torch.equal(fresh(x), model(x))
        assert torch.equal(vl.load(fresh, path)(x), model(x))
        vl.merge(fresh)
        assert_close(fresh(x), model(x))


@pytest.mark.parametrize("part", ["linear1", "linear2", "self_attn"])
def test_a_built_layer_inside_torchs_encoder_layer_is_not_bypassed(part):
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    model = copy.deepcopy(plain)
    old = getattr(model, part)
    convert = (
        LoRALinear.from_linear if part != "self_attn" else LoRAMultiheadAttention.from_attention
    )
    setattr(model, part, disturb(convert(old, rank=2)))
    x = torch.randn(2, 5, 8)
    expected = model.train()(x)
    with torch.no_grad():
        assert_close(model.eval()(x), expected)
        assert not torch.allclose(plain(x), expected)
