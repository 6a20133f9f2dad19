"""Lean activations in whole blocks: the gradients of plain adapters, whatever surrounds them."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError, TargetError

WIDTH, TOKENS = 16, 6
ALL = ["attn.qkv[q,k,v]", "attn.proj", "mlp.fc1", "mlp.fc2"]
CLIP = ["attn[q,v,out]", "mlp.c_fc", "mlp.c_proj"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def timm_block(**options):
    block = timm.models.vision_transformer.Block(WIDTH, 2, init_values=0.5, **options)
    return block.double(), ALL


def clip_block():
    act = open_clip.transformer.QuickGELU
    return open_clip.transformer.ResidualAttentionBlock(WIDTH, 2, act_layer=act).double(), CLIP


def pair(build=timm_block, method="lora", **options):
    """Return a plain and a lean model with the same adapters, which are not zero."""
    plain, targets = build()
    with torch.no_grad():
        for item in plain.parameters():
            item.add_(0.1 * torch.randn_like(item))
    lean = copy.deepcopy(plain)
    options = {"rank": 2, **options}
    for model, how in ((plain, False), (lean, True)):
        vl.inject(model, method, targets, lean=how, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for _, item in vl.trainable_parameters(model):
                item.add_(0.1 * torch.randn_like(item))
    return plain, lean


def tokens(batch=3, dtype=torch.float64):
    return torch.randn(batch, TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def gradients(model, x, loss=lambda y: y.square().sum()):
    model.zero_grad()
    x.grad = None
    loss(model(x)).backward()
    return [x.grad, *(item.grad for _, item in vl.trainable_parameters(model))]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


def kept(model, x):
    """Return how many numbers the forward keeps beside parameters."""
    own = {item.untyped_storage().data_ptr() for item in model.parameters()}
    found = {}

    def pack(item):
        if item.untyped_storage().data_ptr() not in own:
            found[item.untyped_storage().data_ptr()] = item
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        model(x)
    return sum(item.untyped_storage().nbytes() // item.element_size() for item in found.values())


@pytest.mark.parametrize("build", [timm_block, clip_block])
def test_output_and_gradients_are_those_of_the_plain_adapters(build):
    plain, lean = pair(build)
    x = tokens()
    assert torch.equal(lean(x), plain(x))
    assert_same(gradients(lean, x), gradients(plain, x))
    # the inputs of q, k, v and both layers of the MLP
    assert kept(plain, x) - kept(lean, x) == x.numel() * (1 + 1 + 4)


METHODS = {
    "lora": {"rank": 9},  # more than a dense change takes
    "block-lora": {"layout": "grid", "dropout": 0.0},
    "slora": {},
    "hira": {},
    "rand-lora": {},
    "vera": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_need_no_code_of_their_own(method):
    plain, lean = pair(method=method, **METHODS[method])
    x = tokens()
    assert_same(gradients(lean, x), gradients(plain, x))
    assert kept(lean, x) < kept(plain, x)


def test_passes_before_a_backward_do_not_mix():
    plain, lean = pair()
    first, second = tokens(2), tokens(4)
    results = []
    for model in (plain, lean):
        model.zero_grad()
        a, b = model(first), model(second)
        b.square().sum().backward()  # gradients add up, in the other order
        a.square().sum().backward()
        results.append([item.grad for _, item in vl.trainable_parameters(model)])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_is_that_of_the_forward(dtype):
    plain, lean = (model.to(dtype) for model in pair())
    x = tokens(dtype=dtype)
    results = []
    for model in (plain, lean):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        results.append([item.grad for _, item in vl.trainable_parameters(model)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)  # made again bit for bit


def test_training_with_drop_path_is_the_same():
    plain, lean = pair(lambda: timm_block(drop_path=0.4))
    x = tokens(8)
    results = []
    for model in (plain.train(), lean.train()):
        torch.manual_seed(2)
        results.append(gradients(model, x))
    assert_same(*results)


def test_a_dropout_in_between_keeps_its_own_output():
    plain, lean = pair(lambda: timm_block(proj_drop=0.4))
    x = tokens()
    results = []
    for model in (plain.train(), lean.train()):
        torch.manual_seed(2)
        results.append(gradients(model, x))
    assert_same(*results)
    assert kept(plain, x) - kept(lean, x) == x.numel() * 2  # the norms' outputs alone


def test_checkpointing_a_lean_block_is_the_same():
    plain, lean = pair()
    x = tokens()
    again = torch.utils.checkpoint.checkpoint
    actual = gradients(lean, x, lambda _: again(lean, x, use_reentrant=False).square().sum())
    assert_same(actual, gradients(plain, x))


class Between(nn.Module):
    """Something happens between a norm and the layer."""

    def __init__(self, change):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), nn.Module()
        self.attn.qkv = nn.Linear(WIDTH, 3)
        self.change = change

    def forward(self, x):
        return self.attn.qkv(self.change(self.norm1(x)))


CHANGES = [
    lambda n: n.mul_(2.0),
    lambda n: n + 1.0,
    lambda n: n.flip(1),
    lambda n: n[:, 1:].neg_() if n[:, 1:].neg_() is None else n,  # through a view
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_was_changed_is_kept(change):
    plain, lean = pair(lambda: (Between(change).double(), ["attn.qkv"]))
    x = tokens()
    assert_same(gradients(lean, x), gradients(plain, x))


@pytest.mark.parametrize("prepend", [False, True])
def test_a_hook_that_replaces_the_output_counts(prepend):
    plain, lean = pair(lambda: (Between(nn.Identity()).double(), ["attn.qkv"]))
    for model in (plain, lean):
        model.norm1.register_forward_hook(lambda module, args, y: 2 * y, prepend=prepend)
    x = tokens()
    assert_same(gradients(lean, x), gradients(plain, x))


def test_norms_that_train_or_have_adapters_are_right_too():
    plain, lean = pair()
    for model in (plain, lean):
        vl.freeze_base(model, "norm2")
        vl.inject(model, "norm", "norm1", name="norms")
        vl.use(model, ["default", "norms"])
        with torch.no_grad():
            for name, item in vl.trainable_parameters(model):
                if "norm" in name:
                    item.add_(0.5)
    x = tokens()
    assert_same(gradients(lean, x), gradients(plain, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_lean_too(copied):
    _, lean = pair()
    x = tokens()
    assert kept(copied(lean), x) == kept(lean, x)


def test_merge_disable_and_eject_compose():
    plain, lean = pair()
    x = tokens()
    expected = plain(x)
    with vl.merged(lean):
        assert_close(lean(x), expected)
    with vl.disabled(plain), vl.disabled(lean):
        assert torch.equal(lean(x), plain(x))
    types = {name: type(module) for name, module in timm_block()[0].named_modules()}
    vl.eject(lean)
    assert {name: type(module) for name, module in lean.named_modules()} == types
    assert not any(module._forward_hooks for module in lean.modules())


def test_a_loaded_adapter_can_be_made_lean(tmp_path):
    plain, lean = pair()
    vl.save(plain, tmp_path / "adapter.safetensors")
    loaded = vl.eject(copy.deepcopy(plain))
    vl.load(loaded, tmp_path / "adapter.safetensors")
    x = tokens()
    assert kept(vl.make_lean(vl.make_lean(loaded)), x) == kept(lean, x)
    with pytest.raises(AdapterStateError, match="no adapter"):
        vl.make_lean(vl.eject(loaded))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dora", {}, "dora at attn.qkv keeps more than its input"),
        ("oft", {"block": 4}, "oft at attn.qkv keeps more"),
        ("lora", {"dropout": 0.1}, "dropout=0.1, whose input has to be kept"),
    ],
)
def test_methods_that_cannot_be_lean_are_refused_before_the_model_is_touched(
    method, options, message
):
    block, _ = timm_block()
    before = {name: type(module) for name, module in block.named_modules()}
    with pytest.raises(ConfigError, match=message):
        vl.inject(block, method, "attn.qkv", lean=True, **options)
    assert {name: type(module) for name, module in block.named_modules()} == before
    assert all(item.requires_grad for item in block.parameters())


@pytest.mark.parametrize(
    ("model", "targets", "mode"),
    [
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "1", "auto"),
        (timm_block()[0], "attn.proj", "auto"),
        (timm_block()[0], "attn.qkv", "dense"),
    ],
)
def test_nothing_to_be_lean_at_is_an_error(model, targets, mode):
    with pytest.raises(TargetError, match="lean=True recognises no block"):
        vl.inject(model, "lora", targets, mode=mode, lean=True)
