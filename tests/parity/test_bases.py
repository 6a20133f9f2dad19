"""Methods on fixed or shared bases: PEFT's numbers in our modules give PEFT's change.

All trainables and all frozen tensors are copied from PEFT; then changes, outputs, gradients and
merged weights agree.
"""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.record import SHARED

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK = 6
LAYERS = ["up", "down", "same"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(64, 192)
        self.down = nn.Linear(192, 64, bias=False)
        self.same = nn.Linear(64, 64)

    def forward(self, x):
        return self.same(self.down(torch.tanh(self.up(x))))


def both(config, method, dtype, **options):
    """Return our model, theirs, our Deltas, their layers and our Shared."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(Toy().to(dtype), config).to(dtype)
    ours = vl.inject(Toy().to(dtype), method, targets=LAYERS, **options)
    deltas = [getattr(ours, name).adapters["default"]["weight"] for name in LAYERS]
    layers = [getattr(theirs.base_model.model, name) for name in LAYERS]
    return ours, theirs, deltas, layers, getattr(ours, SHARED)["default"]


@torch.no_grad()
def copy(pairs):
    """Move their trainables away from the initial values and copy them into ours."""
    generator = torch.Generator().manual_seed(6)
    for mine, other in pairs:
        other.add_(0.1 * torch.randn(other.shape, generator=generator).to(other.dtype))
        mine.copy_(other)


def compare(ours, theirs, deltas, layers, pairs):
    """Compare changes, outputs, gradients of all trainables, and merged weights."""
    dtype = ours.up.weight.dtype
    ours.eval()
    theirs.eval()
    for delta, layer in zip(deltas, layers, strict=True):
        change = delta.delta(layer.get_base_layer().weight.detach())
        assert float(change.detach().abs().max()) > 1e-4
        assert_close(change, layer.get_delta_weight("default"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine, other = ours(x), theirs(x)
    assert_close(mine, other)
    assert not torch.allclose(mine, Toy().to(dtype)(x), atol=1e-4)
    goal = torch.linspace(-1, 1, mine.numel(), dtype=dtype).reshape(mine.shape)
    (mine * goal).sum().backward()
    (other * goal).sum().backward()
    for one, two in pairs:
        assert bool(two.grad.any())
        assert_close(one.grad, two.grad, factor=10)
    count = sum(one.numel() for one, _ in pairs)
    assert count == sum(item.numel() for _, item in vl.trainable_parameters(ours))
    assert count == sum(item.numel() for item in theirs.parameters() if item.requires_grad)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    for name, item in ours.named_parameters():
        assert_close(item, merged.get_parameter(name))


@DTYPES
@pytest.mark.parametrize("bases", ["dense", "sparse", "very-sparse"])
def test_rand_lora(dtype, bases):
    config = peft.RandLoraConfig(
        r=RANK,
        randlora_alpha=9,
        target_modules=LAYERS,
        sparse=bases == "sparse",
        very_sparse=bases == "very-sparse",
    )
    ours, theirs, deltas, layers, shared = both(
        config, "rand-lora", dtype, rank=RANK, alpha=9.0, layout="peft", bases=bases
    )
    pairs = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs.append((delta.Lambda, layer.randlora_lambda["default"]))
        pairs.append((delta.Gamma, layer.randlora_gamma["default"]))
    for one, two in pairs:
        assert torch.equal(one, two)  # the same initial values
    copy(pairs)
    A, B = theirs.base_model.randlora_A["default"], theirs.base_model.randlora_B["default"]
    law = (shared.A.double(), shared.B.double())
    for mine, other in zip(law, (A.double(), B.double()), strict=True):
        assert abs(float(mine.std() / other.std()) - 1) < 0.25
        assert abs(float(mine.abs().max() / other.abs().max()) - 1) < 0.25
    shared.A.copy_(A[:, 0])
    shared.B.copy_(B.flatten(1))
    compare(ours, theirs, deltas, layers, pairs)


def test_the_layouts_of_rand_lora_differ_only_in_which_bases_meet():
    config = peft.RandLoraConfig(r=RANK, target_modules=LAYERS)
    changes = {}
    for layout in ("paper", "peft"):
        _, theirs, deltas, layers, shared = both(
            config, "rand-lora", torch.float64, rank=RANK, layout=layout
        )
        shared.A.copy_(theirs.base_model.randlora_A["default"][:, 0])
        shared.B.copy_(theirs.base_model.randlora_B["default"].flatten(1))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for item in deltas[0].parameters():
                item.copy_(torch.randn(item.shape, generator=generator))
        changes[layout] = deltas[0].delta(layers[0].get_base_layer().weight).detach()
    difference = (changes["paper"] - changes["peft"]).norm() / changes["peft"].norm()
    assert float(difference) > 1
    assert 0.8 < float(changes["paper"].norm() / changes["peft"].norm()) < 1.25


@DTYPES
def test_uni_lora(dtype):
    config = peft.UniLoraConfig(r=RANK, theta_d_length=500, target_modules=LAYERS)
    ours, theirs, deltas, layers, shared = both(config, "uni-lora", dtype, rank=RANK, length=500)
    index = torch.cat(
        [
            part["default"].flatten()
            for layer in layers
            for part in (layer.unilora_indices_A, layer.unilora_indices_B)
        ]
    )
    # the same law: every entry of the vector equally often, give or take one
    for item in (index, shared.index):
        count = torch.bincount(item, minlength=500)
        assert int(count.max() - count.min()) <= 1
    shared.index.copy_(index)
    shared.inverse_root.copy_(torch.bincount(index).float().rsqrt())
    theta = theirs.base_model.unilora_theta_d["default"]
    for item in (shared.theta, theta):
        assert 0.95 * 0.02 < float(item.detach().abs().max()) <= 0.02
    pairs = [(shared.theta, theta)]
    copy(pairs)
    compare(ours, theirs, deltas, layers, pairs)


@DTYPES
@pytest.mark.parametrize("top_k", [2, 3])
def test_vb_lora(dtype, top_k):
    config = peft.VBLoRAConfig(
        r=RANK, num_vectors=9, vector_length=16, topk=top_k, target_modules=LAYERS
    )
    ours, theirs, deltas, layers, shared = both(
        config, "vb-lora", dtype, rank=RANK, bank=9, block=16, top_k=top_k
    )
    pairs = [(shared.bank, theirs.base_model.vblora_vector_bank["default"])]
    for delta, layer in zip(deltas, layers, strict=True):
        pairs.append((delta.logits_A, layer.vblora_logits_A["default"]))
        pairs.append((delta.logits_B, layer.vblora_logits_B["default"]))
    for one, two in pairs:  # the same law of the initial values
        assert abs(float((one.std() / two.std()).detach()) - 1) < 0.2
    copy(pairs)
    compare(ours, theirs, deltas, layers, pairs)
