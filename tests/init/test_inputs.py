"""Covariance and components of what adapted layers are given."""

import math

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.init.looking import cross_entropy, joined, mixed, tower, vectors
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, DataError
from visionlora.init.inputs import Moments
from visionlora.init.stats import collect

BOTH = {"covariance", "components"}


def look(model, batches, loss_fn=cross_entropy, **options):
    chosen = {"needs": BOTH, "components": 4, **options}
    return collect(model, batches, loss_fn, **chosen).sites


def moment(x):
    """The mean of `x x^T` over all positions."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.t() @ flat / len(flat)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, stats in expected.items():
        assert_close(found[name].covariance, stats.covariance)
        assert_close(found[name].components.singular, stats.components.singular)
        assert_close(found[name].components.ratio, stats.components.ratio)


# -- each layer sees its own input


def inner(model, x):
    """The inputs of all layers of the tower, computed by hand."""
    inputs = {"qkv.q": x, "qkv.v": x}
    q, k, v = nn.functional.linear(x, model.qkv.weight, model.qkv.bias).chunk(3, -1)
    inputs |= {"attn.q": q, "attn.k": k, "attn.v": v}
    q, k, v = (
        nn.functional.linear(item, weight, bias).unflatten(-1, (2, 4)).transpose(1, 2)
        for item, weight, bias in zip(
            (q, k, v),
            model.attn.in_proj_weight.chunk(3),
            model.attn.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1)
    inputs["attn.out"] = (weights @ v).transpose(1, 2).flatten(2)
    out = model.attn.out_proj
    x = nn.functional.linear(inputs["attn.out"], out.weight, out.bias)
    inputs["conv.weight"] = x.transpose(1, 2).flatten(1)  # the kernel covers the whole image
    conv = nn.functional.linear(
        inputs["conv.weight"], model.conv.weight.flatten(1), model.conv.bias
    )
    norm = model.norm
    scaled = (conv - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    inputs["head.weight"] = scaled * norm.weight + norm.bias
    return inputs


@pytest.mark.parametrize("mode", ["auto", "dense"])
def test_covariance_is_the_mean_outer_product_of_the_inputs(mode):
    model = tower(mode=mode)
    model.norm.running_mean.normal_()
    found = look(model, vectors())
    expected = inner(model, joined(vectors())[0])
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(found[name].covariance, moment(x))


def test_components_are_those_of_the_centred_inputs():
    model = tower()
    found = look(model, vectors())
    for name, x in inner(model, joined(vectors())[0]).items():
        flat = x.reshape(-1, x.shape[-1])
        centred = flat - flat.mean(0)
        _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
        own = found[name].components
        k = len(own.singular)
        assert_close(own.singular, singular[:k])
        assert_close(own.ratio, (singular**2 / (singular**2).sum())[:k])
        present = singular[:k] > 1e-6
        cosines = (own.vectors * rows[:k]).sum(1).abs()[present]
        assert_close(cosines, torch.ones_like(cosines))
        assert bool((own.vectors.gather(1, own.vectors.abs().argmax(1, True)) > 0).all())


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": 2, "padding": "valid", "padding_mode": "circular"},
    ],
)
def test_a_convolution_maps_the_covariance_of_its_patches(options):
    model = nn.Sequential(nn.Conv2d(3, 4, bias=False, **options)).double()
    vl.inject(model, "lora", "0", rank=2)
    x = torch.randn(3, 3, 6, 7).double()
    found = look(model, [x[:1], x[1:]], lambda m, b: m(b).square().mean())["0.weight"]
    with vl.disabled(model), torch.no_grad():
        output = model(x)
        weight = model[0].weight.flatten(1)
    assert_close(weight @ found.covariance @ weight.t(), moment(output.movedim(1, -1)))


def test_slices_of_a_fused_layer_share_their_input():
    found = look(tower(), vectors())
    assert found["qkv.q"].covariance is found["qkv.v"].covariance
    assert found["qkv.q"].components is found["qkv.v"].components


# -- how the data come does not matter


def test_order_and_cut_of_the_batches_do_not_matter():
    model = tower()
    expected = look(model, vectors())
    assert_same(look(model, vectors()[::-1]), expected)
    assert_same(look(model, [joined(vectors())]), expected)


def test_a_large_mean_costs_no_digits():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    shifted, plain = Moments(3, torch.float32), Moments(3, torch.float32)
    for part in x.split(50):
        shifted.add(part + 1e3)
        plain.add(part)
    assert torch.allclose(shifted.components(3).ratio, plain.components(3).ratio, rtol=1e-3)


def test_looking_changes_neither_the_loss_nor_the_model():
    model = tower()
    alone = collect(model, vectors(), cross_entropy, needs=())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    found = collect(model, vectors(), cross_entropy, needs=BOTH, components=1)
    assert found.loss == pytest.approx(alone.loss, rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    x = vectors()[0][0]
    model.eval()
    for _, parameter in vl.trainable_parameters(model):
        parameter.data.normal_()
    with vl.disabled(model):
        base = model(x)
    assert not torch.allclose(model(x), base)  # the adapters are back


def test_probes_leave_an_attention_also_after_an_error():
    model = tower(mode="dense")
    broken = [(x * float("inf"), y) for x, y in vectors()]
    with pytest.raises(DataError, match=r"the input of qkv.q holds NaN or infinity"):
        look(model, broken)
    assert model.attn.state.mode == "dense"
    assert [slot.delta for slot in model.attn.slots] == list(
        model.attn.adapters["default"].values()
    )


def test_one_pass_gathers_everything():
    model = tower()
    once = collect(model, vectors(), cross_entropy, needs={"gradient", *BOTH}, components=4).sites
    assert_same(once, look(model, vectors()))
    alone = collect(model, vectors(), cross_entropy, needs={"gradient"}).sites
    for name, stats in alone.items():
        assert_close(once[name].gradient, stats.gradient)


# -- enough is enough


def test_a_pass_ends_when_the_components_have_settled():
    batches = vectors((6,) * 40)
    stream = iter(batches)
    found = collect(
        tower(rank=1), stream, cross_entropy, needs={"components"}, components=1, steady=0.9
    )
    assert 2 <= found.batches < 40
    assert len(list(stream)) == 40 - found.batches
    options = {"needs": {"components"}, "components": 1}
    assert collect(tower(rank=1), batches, cross_entropy, **options).batches == 40
    # What needs all batches gets all batches.
    options = {"needs": {"components", "gradient"}, "components": 1, "steady": 0.9}
    assert collect(tower(rank=1), batches, cross_entropy, **options).batches == 40


def test_components_that_keep_turning_do_not_end_a_pass():
    torch.default_generator.manual_seed(3)
    model = vl.inject(nn.Linear(6, 2).double(), "lora", rank=1)
    spikes = [torch.eye(6).double()[[i]] * 4.0**i * torch.tensor([[1.0], [-1.0]]) for i in range(6)]
    found = collect(
        model,
        spikes,
        lambda m, b: m(b).square().mean(),
        needs={"components"},
        components=1,
        steady=0.99,
        count=6,
    )
    assert found.batches == 6


# -- what has no input vectors


def test_layers_without_input_vectors_are_refused():
    x = torch.randint(0, 11, (2, 6))
    with pytest.raises(ConfigError, match=r"0.table.weight is a site of kind embedding"):
        look(mixed(), [(x, torch.zeros(2).long())])
    grouped = vl.inject(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "lora", "0", rank=1)
    with pytest.raises(ConfigError, match="grouped convolution"):
        look(grouped, [torch.randn(1, 4, 2, 2)], lambda m, b: m(b).mean())


class Halved(nn.Linear):
    """A layer that does something to its input first."""

    def forward(self, x):
        return super().forward(x / 2)


class Bypassed(nn.Module):
    """Reads the weight of a layer instead of calling it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_layers_whose_input_cannot_be_seen_are_refused():
    own = vl.inject(nn.Sequential(Halved(8, 3)), "lora", "0", rank=1)
    with pytest.raises(ConfigError, match="is a Halved, whose own forward"):
        look(own, [torch.randn(2, 8)], lambda m, b: m(b).mean())
    read = vl.inject(Bypassed(), "lora", "layer", rank=1)
    with pytest.raises(ConfigError, match=r"layer.weight was never called"):
        look(read, [torch.randn(2, 8)], lambda m, b: m(b).mean())


def test_layers_are_called_by_name_or_by_position():
    model = vl.inject(nn.Linear(8, 3).double(), "lora", rank=2)
    x = torch.randn(5, 8).double()
    by_name = look(model, [x], lambda m, b: m(x=b).mean())
    assert_close(by_name["weight"].covariance, moment(x))
