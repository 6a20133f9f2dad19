"""The same weights in PEFT give the same change, output and gradients."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.record import SHARED

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK = 4


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 16)
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)  # PEFT drops a dilation
        self.up = nn.Linear(64, 192)
        self.down = nn.Linear(192, 64, bias=False)
        self.same = nn.Linear(64, 64)

    def forward(self, index):
        x = self.conv(self.table(index).permute(0, 3, 1, 2)).flatten(1)
        return self.same(self.down(torch.tanh(self.up(x))))


INDEX = torch.arange(3 * 16).reshape(3, 4, 4) % 13
LINEAR = ["up", "down", "same"]


def configuration(method, targets, **options):
    """Return PEFT's configuration and our method with its options."""
    if method == "vera":
        return (
            peft.VeraConfig(r=RANK, target_modules=targets, d_initial=0.1, **options),
            ("vera", {"rank": RANK}),
        )
    flags = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(method, {})
    return (
        peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=targets, **flags, **options),
        (method, {"rank": RANK, "alpha": 10.0}),
    )


def pairs_of(ours, theirs):
    """Yield `(our parameter, PEFT's, view)` of every trainable, by layer."""
    for name, layer in ours.named_modules():
        if not hasattr(layer, "adapters") or name == "":
            continue
        delta = layer.adapters["default"]["weight"]
        other = theirs.base_model.model.get_submodule(name)
        if hasattr(other, "vera_lambda_b") and len(other.vera_lambda_b):
            yield delta.b, other.vera_lambda_b["default"]
            yield delta.d, other.vera_lambda_d["default"]
        elif isinstance(layer, nn.Embedding):
            yield delta.A, other.lora_embedding_A["default"]
            yield delta.B, other.lora_embedding_B["default"]
        else:
            yield delta.A, other.lora_A["default"].weight
            yield delta.B, other.lora_B["default"].weight
        if hasattr(delta, "magnitude"):
            yield delta.magnitude, other.lora_magnitude_vector["default"].weight


def build(method, targets, dtype, **options):
    config, (name, ours_options) = configuration(method, targets, **options)
    theirs = peft.get_peft_model(Toy().to(dtype), config).to(dtype)
    ours = vl.inject(Toy().to(dtype), name, targets=targets, **ours_options)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for mine, other in pairs_of(ours, theirs):
            other.add_(0.1 * torch.randn(other.shape, generator=generator).to(dtype))
            mine.copy_(other.reshape(mine.shape))
        if method == "vera":
            bases = getattr(ours, SHARED)["default"]
            bases.A.copy_(theirs.base_model.vera_A["default"])
            bases.B.copy_(theirs.base_model.vera_B["default"])
    return ours, theirs


CASES = [
    *[(method, LINEAR) for method in ("lora", "rslora", "dora", "vera")],
    *[(method, ["conv", "same"]) for method in ("lora", "rslora", "dora")],
    ("lora", ["table", "up"]),
    ("rslora", ["table"]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("method", "targets"), CASES)
def test_deltas_outputs_gradients_and_merged_weights_agree(method, targets, dtype):
    ours, theirs = build(method, targets, dtype)
    ours.eval()
    theirs.eval()
    base = Toy().to(dtype)(INDEX)
    mine, other = ours(INDEX), theirs(INDEX)
    assert_close(mine, other)
    assert not torch.allclose(mine, base, atol=1e-3)
    weight = torch.linspace(-1, 1, mine.numel(), dtype=dtype).reshape(mine.shape)
    (mine * weight).sum().backward()
    (other * weight).sum().backward()
    count = 0
    for one, two in pairs_of(ours, theirs):
        assert_close(one.grad, two.grad.reshape(one.shape), factor=10)
        count += one.numel()
    assert count == sum(item.numel() for _, item in vl.trainable_parameters(ours))
    assert count == sum(item.numel() for item in theirs.parameters() if item.requires_grad)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    for name, item in ours.named_parameters():
        assert_close(item, merged.get_parameter(name))


def test_a_fused_weight_in_peft_is_ours_by_slices():
    """PEFT adapts q, k, v as one matrix; block-diagonal ups of our slices are the same change."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 48)).double()
    ours = vl.inject(base, "lora", targets="0[q,k,v]", rank=2)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=6, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(16, 48)).double(), config).double()
    layer = theirs.base_model.model[0]
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        for index, key in enumerate("qkv"):
            delta = ours[0].adapters["default"][key]
            delta.B.normal_()
            layer.lora_A["default"].weight[2 * index : 2 * index + 2] = delta.A
            layer.lora_B["default"].weight[
                16 * index : 16 * index + 16, 2 * index : 2 * index + 2
            ] = delta.B
    assert_close(ours(x), theirs(x))


def test_initial_values_follow_the_same_law():
    """A uniform in the same bounds, B zero; on an embedding A zero and B normal."""
    config, _ = configuration("lora", ["up", "table"])
    theirs = peft.get_peft_model(Toy(), config).base_model.model
    ours = vl.inject(Toy(), "lora", targets=["up", "table"], rank=RANK)
    up, table = (getattr(ours, name).adapters["default"]["weight"] for name in ("up", "table"))
    bound = 64**-0.5
    for A in (up.A, theirs.up.lora_A["default"].weight):
        assert 0.9 * bound < float(A.detach().abs().max()) <= bound
        assert abs(float(A.detach().std()) - bound / 3**0.5) < 0.15 * bound
    assert not up.B.any()
    assert not theirs.up.lora_B["default"].weight.any()
    for A, B in (
        (table.A, table.B),
        (theirs.table.lora_embedding_A["default"], theirs.table.lora_embedding_B["default"]),
    ):
        assert not A.any()
        assert 0.6 < float(B.detach().std()) < 1.4


def test_vera_bases_follow_the_same_law():
    config, _ = configuration("vera", LINEAR)
    theirs = peft.get_peft_model(Toy(), config).base_model
    ours = getattr(vl.inject(Toy(), "vera", targets=LINEAR, rank=RANK), SHARED)["default"]
    for mine, other in ((ours.A, theirs.vera_A["default"]), (ours.B, theirs.vera_B["default"])):
        assert mine.shape == other.shape
        assert abs(float(mine.std() / other.std()) - 1) < 0.15
        assert abs(float(mine.abs().max() / other.abs().max()) - 1) < 0.05
