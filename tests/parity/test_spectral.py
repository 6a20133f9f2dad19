"""Methods on the spectrum or the singular vectors of a weight, against PEFT's numbers.

Trainables and frozen tensors are copied from PEFT; then changes, outputs, gradients and merged
weights agree. LoRA-XS has no counterpart there: it is PEFT's TinyLoRA with the unit matrices as
directions, whose core is ours with a root of the singular values moved from one side to the other.
"""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.record import SHARED

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

LAYERS = ["up", "down", "same"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 64)
        self.up = nn.Linear(64, 192)
        self.down = nn.Linear(192, 64, bias=False)
        self.same = nn.Linear(64, 64)

    def forward(self, index):
        return self.same(self.down(torch.tanh(self.up(self.table(index)))))


INDEX = torch.arange(10).reshape(2, 5)


def both(config, method, dtype, targets=LAYERS, **options):
    """Return both models with their layers: `{name: (our Delta, their layer)}`."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(Toy().to(dtype), config).to(dtype).eval()
    ours = vl.inject(Toy().to(dtype), method, targets=targets, **options).eval()
    layers = {
        name: (
            getattr(ours, name).adapters["default"]["weight"],
            getattr(theirs.base_model.model, name),
        )
        for name in targets
    }
    return ours, theirs, layers


def run(model):
    """Return the output after a backward pass of a fixed projection."""
    y = model(INDEX)
    goal = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * goal).sum().backward()
    return y.detach()


def compare(ours, theirs, layers, gradients, factor=1.0):
    """Compare changes, outputs, gradients (`() -> pairs`, read after backward), merged weights."""
    for mine, other in layers.values():
        weight = other.get_base_layer().weight.detach()
        table = isinstance(other.get_base_layer(), nn.Embedding)
        change = mine.delta(weight.t() if table else weight)
        assert float(change.detach().abs().max()) > 1e-4
        assert_close(change.t() if table else change, other.get_delta_weight("default"), factor)
    y = run(ours)
    assert_close(y, run(theirs), factor)
    assert not torch.allclose(y, Toy().to(y.dtype)(INDEX), atol=1e-4)
    for one, two in gradients():
        assert bool(two.any())
        assert_close(one, two, 10 * factor)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    assert_close(ours(INDEX), merged(INDEX), factor)
    for name, item in ours.named_parameters():
        assert_close(item, merged.get_parameter(name), factor)


def trained(model):
    return sum(item.numel() for item in model.parameters() if item.requires_grad)


@torch.no_grad()
def randomise(parameters, size=1.0):
    generator = torch.Generator().manual_seed(6)
    for item in parameters:
        item.copy_(size * torch.randn(item.shape, generator=generator))


@DTYPES
@pytest.mark.parametrize("count", [5, 300])
def test_fourier_ft(dtype, count):
    config = peft.FourierFTConfig(n_frequency=count, target_modules=LAYERS, scaling=90.0)
    ours, theirs, layers = both(
        config, "fourier-ft", dtype, coefficients=count, scale=90.0, seed=777
    )
    pairs = [(mine.c, other.fourierft_spectrum["default"]) for mine, other in layers.values()]
    randomise([other for _, other in pairs])
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    for mine, other in layers.values():
        assert torch.equal(mine.positions, other.indices["default"])  # without being copied
        assert (mine.factors() is None) is (count == 300)
    assert trained(ours) == trained(theirs) == 3 * count
    # PEFT transforms in float32 whatever the dtype.
    factor = 1e5 if dtype == torch.float64 else 1.0
    compare(ours, theirs, layers, lambda: [(a.grad, b.grad) for a, b in pairs], factor)


@DTYPES
@pytest.mark.parametrize("tying", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("table", [False, True], ids=["linear", "embedding"])
def test_tiny_lora(dtype, tying, table):
    targets = ["table", *LAYERS] if table else LAYERS
    config = peft.TinyLoraConfig(r=3, u=8, weight_tying=tying, target_modules=targets)
    ours, theirs, layers = both(
        config, "tiny-lora", dtype, targets, rank=3, coefficients=8, weight_tying=tying
    )
    shared = getattr(ours, SHARED)["default"]
    vectors = theirs.base_model.tinylora_v["default"]
    assert len(vectors) == len(shared.v)
    for name, (_, other) in layers.items():
        assert other._tinylora_v_key["default"] == str(shared.group[f"{name}.weight"])
    randomise(vectors.values())
    with torch.no_grad():
        for key, item in vectors.items():
            shared.v[int(key)] = item
        for mine, other in layers.values():
            A, B, P = (getattr(other, f"tinylora_{part}")["default"] for part in "ABP")
            if isinstance(other.get_base_layer(), nn.Embedding):  # ours is the transposed table
                A, B, P = B.t(), A.t(), P.transpose(1, 2)
            mine.A.copy_(A)
            mine.B.copy_(B)
            mine.P.copy_(P)
    assert trained(ours) == trained(theirs)
    compare(
        ours,
        theirs,
        layers,
        lambda: [(shared.v.grad[int(key)], item.grad) for key, item in vectors.items()],
    )


def test_tiny_lora_factors_and_laws_are_those_of_peft():
    config = peft.TinyLoraConfig(r=3, u=500, target_modules=LAYERS, init_weights="uniform")
    ours, theirs, layers = both(config, "tiny-lora", torch.float32, rank=3, coefficients=500)
    for mine, other in layers.values():
        A, B, P = (getattr(other, f"tinylora_{part}")["default"] for part in "ABP")
        signs = (A * mine.A).sum(1).sign()
        assert_close(mine.A, signs[:, None] * A, factor=100)
        assert_close(mine.B, signs * B, factor=100)
        assert abs(float(mine.P.std() / P.std()) - 1) < 0.05
    v = getattr(ours, SHARED)["default"].v.detach()
    other = torch.stack(list(theirs.base_model.tinylora_v["default"].values())).detach()
    assert v.shape == other.shape
    assert abs(float(v.std() / other.std()) - 1) < 0.1
    assert abs(float(v.abs().max() / other.abs().max()) - 1) < 0.05


@DTYPES
def test_lora_xs_is_tiny_lora_with_unit_directions(dtype):
    rank = 4
    config = peft.TinyLoraConfig(r=rank, u=rank**2, target_modules=LAYERS)
    ours, theirs, layers = both(config, "lora-xs", dtype, rank=rank)
    randomise([mine.R for mine, _ in layers.values()])
    units = torch.eye(rank**2).reshape(-1, rank, rank)
    found = []
    with torch.no_grad():
        for mine, other in layers.values():
            # ours: U R (S V); theirs: (U sqrt S) C (sqrt S V), up to the signs D of their vectors
            root = mine.A.norm(dim=1).sqrt()
            signs = (other.tinylora_A["default"] * mine.A).sum(1).sign()
            A = signs[:, None] * mine.A / root[:, None]
            # PEFT decomposes in float32, so its numbers are replaced by exact ones
            assert_close(other.tinylora_A["default"].float(), A.float(), factor=100)
            other.tinylora_A["default"].copy_(A)
            other.tinylora_B["default"].copy_(signs * mine.B * root)
            other.tinylora_P["default"].copy_(units)
            ratio = (signs / root)[:, None] * (signs * root)
            vector = other.tinylora_v["default"][other._tinylora_v_key["default"]]
            vector.copy_((ratio * mine.R).flatten())
            found.append((mine.R, vector, ratio))
    assert trained(ours) == trained(theirs) == 3 * rank**2
    compare(
        ours,
        theirs,
        layers,
        lambda: [(R.grad, ratio * v.grad.view_as(R)) for R, v, ratio in found],
    )
