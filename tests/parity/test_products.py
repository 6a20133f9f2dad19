"""Products, shards and rotations: PEFT's numbers in our modules give PEFT's function."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import visionlora as vl
from tests.parity import test_peft
from tests.parity.test_peft import INDEX, LINEAR
from tests.tolerances import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


class Toy(test_peft.Toy):
    """The same net; PEFT's OFT takes four-dimensional tokens for an image."""

    def forward(self, index):
        x = self.table(index.flatten()).unflatten(0, index.shape).permute(0, 3, 1, 2)
        return self.same(self.down(torch.tanh(self.up(self.conv(x).flatten(1)))))


class Pair(NamedTuple):
    """Our parameter, theirs, and how values and gradients are converted into ours."""

    mine: Tensor
    other: Tensor
    values: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]


def same(item):
    return item


def negative(item):
    return -item


def triangle(matrices):
    rows, columns = torch.triu_indices(*matrices.shape[-2:], 1).unbind()
    return matrices[..., rows, columns]


def hira(delta, layer, kind):
    prefix = "hira_embedding_" if kind is nn.Embedding else "hira_"
    return [(getattr(delta, name), getattr(layer, prefix + name)) for name in "AB"]


def loha(delta, layer, kind):
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    return [(getattr(delta, mine), getattr(layer, other)) for mine, other in names.items()]


def lokr(delta, layer, kind):
    return [(item, getattr(layer, f"lokr_{name}")) for name, item in delta.named_parameters()]


def miss(delta, layer, kind):
    return [(delta.D, layer.miss_block)]


def oft(delta, layer, kind):
    modules = layer.oft_embedding_R if kind is nn.Embedding else layer.oft_R
    # PEFT's series is that of the transposed rotation.
    sign = negative if delta.options.cayley == "neumann" else same
    return [(delta.Q, {"default": modules["default"].weight}, sign, sign)]


def boft(delta, layer, kind):
    # PEFT trains whole matrices M of which only (M - M^T) / 2 matters.
    return [
        (delta.Q, layer.boft_R, lambda M: triangle((M - M.mT) / 2), lambda g: 2 * triangle(g)),
        (delta.s, layer.boft_s),
    ]


def pairs_of(ours, theirs, find):
    for name, layer in ours.named_modules():
        if not name or not hasattr(layer, "adapters"):
            continue
        delta = layer.adapters["default"]["weight"]
        other = theirs.base_model.model.get_submodule(name)
        for mine, parts, *convert in find(delta, other, layer.plain_class):
            yield Pair(mine, parts["default"], *(convert or (same, same)))


def build(config, find, method, options, dtype):
    targets = sorted(config.target_modules)
    theirs = peft.get_peft_model(Toy().to(dtype), config).to(dtype)
    ours = vl.inject(Toy().to(dtype), method, targets=targets, **options)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for pair in pairs_of(ours, theirs, find):
            noise = 0.1 * torch.randn(pair.other.shape, generator=generator)
            pair.other.add_(noise.to(dtype))
            pair.mine.copy_(pair.values(pair.other).reshape(pair.mine.shape))
    return ours.eval(), theirs.eval()


CONV = ["conv", "same"]
TABLE = ["table", "up"]
CASES = [
    ("hira", LINEAR, peft.HiraConfig, {"r": 4}, {"rank": 4}),
    ("hira", CONV, peft.HiraConfig, {"r": 4}, {"rank": 4}),
    ("hira", TABLE, peft.HiraConfig, {"r": 4}, {"rank": 4}),
    ("loha", LINEAR, peft.LoHaConfig, {"r": 4, "alpha": 5}, {"rank": 4, "alpha": 5.0}),
    ("loha", LINEAR, peft.LoHaConfig, {"r": 16, "alpha": 5}, {"rank": 16, "alpha": 5.0}),
    ("loha", CONV, peft.LoHaConfig, {"r": 4, "alpha": 5}, {"rank": 4, "alpha": 5.0}),
    ("lokr", LINEAR, peft.LoKrConfig, {"r": 2, "alpha": 5}, {"rank": 2, "alpha": 5.0}),
    ("lokr", LINEAR, peft.LoKrConfig, {"r": 8, "alpha": 5}, {"rank": 8, "alpha": 5.0}),
    ("lokr", CONV, peft.LoKrConfig, {"r": 1, "alpha": 5}, {"rank": 1, "alpha": 5.0}),
    ("lokr", CONV, peft.LoKrConfig, {"r": 8, "alpha": 5}, {"rank": 8, "alpha": 5.0}),
    (
        "lokr",
        [*LINEAR, "conv"],
        peft.LoKrConfig,
        {"r": 3, "alpha": 3, "decompose_factor": 4},
        {"rank": 3, "factor": 4},
    ),
    ("miss", LINEAR, peft.MissConfig, {"r": 16}, {"rank": 16}),
    ("miss", LINEAR, peft.MissConfig, {"r": 5}, {"rank": 5}),
    (
        "miss",
        LINEAR,
        peft.MissConfig,
        {"r": 16, "init_weights": "bat"},
        {"rank": 16, "variant": "bat"},
    ),
    (
        "miss",
        LINEAR,
        peft.MissConfig,
        {"r": 5, "mini_r": 4, "init_weights": "mini"},
        {"rank": 5, "variant": "mini", "mini_rank": 4},
    ),
    (
        "oft",
        LINEAR,
        peft.OFTConfig,
        {"oft_block_size": 16, "use_cayley_neumann": False},
        {"block": 16},
    ),
    ("oft", LINEAR, peft.OFTConfig, {"oft_block_size": 8}, {"block": 8, "cayley": "neumann"}),
    (
        "oft",
        LINEAR,
        peft.OFTConfig,
        {"oft_block_size": 16, "use_cayley_neumann": False, "block_share": True},
        {"block": 16, "share": True},
    ),
    (
        "oft",
        TABLE,
        peft.OFTConfig,
        {"oft_block_size": 8, "use_cayley_neumann": False},
        {"block": 8},
    ),
    (
        "boft",
        LINEAR,
        peft.BOFTConfig,
        {"boft_block_size": 8},
        {"block": 8, "depth": 1},
    ),
    (
        "boft",
        CONV,
        peft.BOFTConfig,
        {"boft_block_size": 8},
        {"block": 8, "depth": 1},
    ),
]
FIND = {"hira": hira, "loha": loha, "lokr": lokr, "miss": miss, "oft": oft, "boft": boft}


def label(case):
    return "-".join([case[0], case[1][0], *(str(value) for value in case[4].values())])


@pytest.mark.filterwarnings("ignore")  # PEFT looks for a CUDA compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_outputs_gradients_and_merged_weights_agree(case, dtype):
    method, targets, config, theirs_options, options = case
    find = FIND[method]
    ours, theirs = build(
        config(target_modules=targets, **theirs_options), find, method, options, dtype
    )
    base = Toy().to(dtype)(INDEX)
    mine, other = ours(INDEX), theirs(INDEX)
    assert_close(mine, other)
    assert not torch.allclose(mine, base, atol=1e-4)
    goal = torch.linspace(-1, 1, mine.numel(), dtype=dtype).reshape(mine.shape)
    (mine * goal).sum().backward()
    (other * goal).sum().backward()
    found = list(pairs_of(ours, theirs, find))
    for pair in found:
        assert bool(pair.mine.grad.any())
        expected = pair.gradient(pair.other.grad)
        assert_close(pair.mine.grad, expected.reshape(pair.mine.shape), factor=10)
    count = sum(pair.mine.numel() for pair in found)
    assert count == sum(item.numel() for _, item in vl.trainable_parameters(ours))
    if method != "boft":
        assert count == sum(item.numel() for item in theirs.parameters() if item.requires_grad)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    for name, item in ours.named_parameters():
        assert_close(item, merged.get_parameter(name))


def test_oft_on_a_convolution_is_what_peft_merges():
    """PEFT's unmerged forward is another function there: it adds up overlapping patches."""
    config = peft.OFTConfig(target_modules=["conv"], oft_block_size=8, use_cayley_neumann=False)
    ours, theirs = build(config, oft, "oft", {"block": 8}, torch.float64)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    assert_close(ours.conv.weight, merged.conv.weight)
    assert not torch.allclose(merged.conv.weight, Toy().double().conv.weight, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depth", [2, 3])
def test_the_butterfly_is_the_one_that_peft_describes(depth):
    """PEFT multiplies several rotations on CUDA only; its matrices are put together here."""
    config = peft.BOFTConfig(target_modules=["same"], boft_block_size=4)
    layer = peft.get_peft_model(Toy(), config).base_model.model.same
    ours = vl.inject(Toy().double(), "boft", targets="same", block=4, depth=depth)
    delta = ours.same.adapters["default"]["weight"]
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(depth, 16, 4, 4, generator=generator).double()
    s = torch.randn(64, generator=generator).double()
    with torch.no_grad():
        delta.Q.copy_(triangle((M - M.mT) / 2))
        delta.s.copy_(s)
    rotation = torch.eye(64).double()
    for level in range(depth):
        order = layer.block_butterfly_perm(64, 16 // 2**level, 2, depth - 1)
        P = layer.perm2mat(order).double()
        rotation = P @ torch.block_diag(*layer.cayley_batch(M[level])) @ P.t() @ rotation
    weight = ours.same.weight.detach()
    expected = s[:, None] * (rotation @ weight.t()).t()
    assert_close(weight + delta.delta(weight).detach(), expected)


def test_initial_values_follow_the_same_laws():
    """Uniform parts in the same bounds, the same parts at zero."""
    cases = [
        (peft.HiraConfig(r=8, target_modules=["up", "table"]), hira, "hira", {"rank": 8}),
        (peft.LoHaConfig(r=8, target_modules=["up"]), loha, "loha", {"rank": 8}),
        (peft.LoKrConfig(r=2, target_modules=["up"]), lokr, "lokr", {"rank": 2}),
        (
            peft.LoKrConfig(r=2, target_modules=["up"], init_weights="lycoris"),
            lokr,
            "lokr",
            {"rank": 2, "init": "w2"},
        ),
        (peft.MissConfig(r=8, target_modules=["up"]), miss, "miss", {"rank": 8}),
        (peft.OFTConfig(oft_block_size=8, target_modules=["up"]), oft, "oft", {"block": 8}),
    ]
    for config, find, method, options in cases:
        torch.manual_seed(1)
        theirs = peft.get_peft_model(Toy(), config)
        ours = vl.inject(Toy(), method, targets=sorted(config.target_modules), **options)
        for pair in pairs_of(ours, theirs, find):
            assert pair.mine.shape == pair.other.shape
            assert bool(pair.mine.any()) is bool(pair.other.any())
            if pair.mine.any():
                ratio = float(pair.mine.detach().std() / pair.other.detach().std())
                assert abs(ratio - 1) < 0.5
