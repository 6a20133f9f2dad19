"""A layer whose weight is read directly is found before it is adapted, and nothing else is."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import TargetError
from visionlora.hosts import DenseHost
from visionlora.hosts.choose import read_by


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Called(Base):
    def forward(self, x):
        return self.proj(self.qkv(x))


class Harmless(Base):
    def forward(self, x):
        x = x.to(self.qkv.weight.dtype).to(self.qkv.weight.device)
        assert self.qkv.weight.shape[1] == x.shape[-1]
        return self.proj(self.qkv(x))


class Reads(Base):
    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.qkv.bias))


class Assigns(Base):
    def forward(self, x):
        weight = self.qkv.weight
        return self.proj(x @ weight.t() + self.qkv.bias)


class Aliases(Base):
    def forward(self, x):
        layer = self.qkv
        used = layer
        layer = self.proj
        x = F.linear(x, used.weight, used.bias)
        return layer(x.to(layer.weight.dtype))


class Transposes(Base):
    def forward(self, x):
        return self.proj(x @ self.qkv.weight.t() + self.qkv.bias)


class Helper(Base):
    def attend(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)

    def forward(self, x):
        return self.proj(self.attend(x))


class Property(Base):
    @property
    def matrix(self):
        return self.qkv.weight

    def forward(self, x):
        return self.proj(F.linear(x, self.matrix, self.qkv.bias))


class Inherits(Reads):
    def forward(self, x):
        return super().forward(x)


def same(function):
    @functools.wraps(function)
    def wrapped(*inputs):
        return function(*inputs)

    return wrapped


class Decorated(Base):
    @same
    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.qkv.bias))


class Static(Base):
    @staticmethod
    def attend(layer, x):
        return F.linear(x, layer.qkv.weight, layer.qkv.bias)

    def forward(self, x):
        return self.proj(self.attend(self, x))


class Nested(Base):
    def forward(self, x):
        return self.proj(sum(F.linear(part, self.qkv.weight, self.qkv.bias) for part in [x]))


class Overrides(Reads):
    """The parent's forward, which reads, is never called."""

    def forward(self, x):
        return self.proj(self.qkv(x))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Called()

    def forward(self, x):
        return self.inner.proj(F.linear(x, self.inner.qkv.weight, self.inner.qkv.bias))


READERS = [
    Reads,
    Assigns,
    Aliases,
    Transposes,
    Helper,
    Property,
    Inherits,
    Decorated,
    Static,
    Nested,
    Around,
]


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_gets_a_dense_host_that_acts_and_trains(kind):
    model = kind().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    vl.inject(model, "lora", targets="qkv", rank=2)
    (host,) = (module for module in model.modules() if hasattr(module, "adapters"))
    assert isinstance(host, DenseHost)
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.add_(0.3 * torch.randn_like(item))
    after = model(x)
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert all(bool(item.grad.abs().sum() > 0) for _, item in vl.trainable_parameters(model))
    with vl.merged(model):
        assert_close(model(x), after)
    vl.eject(model)
    assert torch.equal(model(x), before)
    with pytest.raises(TargetError, match="weight"):
        vl.inject(model, "lora", targets="qkv", rank=2, mode="factored")


@pytest.mark.parametrize("kind", [Called, Harmless, Overrides])
def test_a_layer_that_is_called_keeps_the_cheap_path(kind):
    assert read_by(kind(), "qkv") == ""
    assert read_by(kind(), "proj") == ""


@pytest.mark.parametrize("kind", READERS)
def test_only_the_layer_that_is_read_is_dense(kind):
    model = kind()
    name = "inner.proj" if kind is Around else "proj"
    assert read_by(model, name) == ""


# Models by name, the layer, and whether something reads its weight.
@pytest.mark.parametrize(
    ("name", "layer", "reads"),
    [
        ("beit_base_patch16_224", "blocks.0.attn.qkv", True),
        ("beit_base_patch16_224", "blocks.0.attn.proj", False),
        ("eva02_tiny_patch14_224", "blocks.0.attn.q_proj", False),
        ("eva_giant_patch14_224", "blocks.0.attn.qkv", True),
        ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn.qkv", True),
        ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn.proj", False),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.qkv", False),
        ("vit_base_patch16_224", "blocks.0.attn.qkv", False),
        ("vit_base_patch16_224", "blocks.0.mlp.fc1", False),
        ("vit_base_patch16_224", "head", False),
        ("convnext_tiny", "stages.0.blocks.0.mlp.fc1", False),
        ("resnet50", "layer1.0.conv1", False),
    ],
)
def test_timm_models(name, layer, reads):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert bool(read_by(model, layer)) is reads


@pytest.mark.parametrize(
    "build",
    [
        lambda: Conv2dSame(4, 6, 3, stride=2),
        lambda: StdConv2d(4, 6, 3),
        lambda: ScaledStdConv2d(4, 6, 3),
    ],
    ids=["same", "std", "scaled"],
)
def test_a_convolution_with_its_own_forward_is_adapted_through_its_weight(build):
    model = nn.Sequential(build()).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    before = model(x)
    vl.inject(model, "lora", targets="type:Conv2d", rank=2)
    assert isinstance(model[0], DenseHost)
    assert_close(model(x), before)
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.add_(0.3 * torch.randn_like(item))
    after = model(x)
    assert not torch.allclose(after, before)
    with vl.merged(model):
        assert_close(model(x), after)
    after.sum().backward()
    assert all(item.grad is not None for _, item in vl.trainable_parameters(model))
