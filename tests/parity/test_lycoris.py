"""LyCORIS: the same numbers in its modules and ours give the same weight, output and gradients."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close

modules = pytest.importorskip("lycoris.modules")
pytestmark = pytest.mark.parity

LAYERS = {
    "square": (lambda: nn.Linear(64, 64), (5, 64)),
    "tall": (lambda: nn.Linear(64, 192), (5, 64)),
    "wide": (lambda: nn.Linear(192, 64, bias=False), (5, 192)),
    "prime": (lambda: nn.Linear(13, 7), (5, 13)),
    "conv": (lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1), (2, 12, 7, 7)),
    "conv-1x1": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 5, 5)),
    "conv-grouped": (lambda: nn.Conv2d(12, 16, (3, 2), groups=2), (2, 12, 5, 5)),
    "conv-dilated": (lambda: nn.Conv2d(12, 16, 3, dilation=2, padding="same"), (2, 12, 7, 7)),
}
NAMES = {
    "lora": {"A": "lora_down.weight", "B": "lora_up.weight"},
    "loha": {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    "lokr": {name: f"lokr_{name}" for name in ("w1", "w2", "w2_a", "w2_b")},
}
CLASSES = {"lora": "locon.LoConModule", "loha": "loha.LohaModule", "lokr": "lokr.LokrModule"}
CASES = [
    ("lora", 3, {}, {}),
    ("lora", 3, {"rs_lora": True}, {"scaling": "rslora"}),
    ("loha", 2, {}, {}),
    ("lokr", 1, {}, {}),
    ("lokr", 2, {"factor": 2}, {"factor": 2}),
    # With both parts whole LyCORIS leaves the scale out.
    ("lokr", 64, {}, {"alpha": None}),
]


def build(method, layer, rank, theirs_options, options):
    """Return our adapted layer, theirs, and `[(our parameter, their parameter)]`."""
    path, name = CLASSES[method].split(".")
    module = getattr(pytest.importorskip(f"lycoris.modules.{path}"), name)
    theirs = module("one", copy.deepcopy(layer), 1.0, rank, 5.0, **theirs_options).double()
    ours = nn.Sequential(copy.deepcopy(layer))
    vl.inject(ours, method, targets="0", **{"rank": rank, "alpha": 5.0, **options})
    delta = ours[0].adapters["default"]["weight"]
    pairs = [
        (item, theirs.get_parameter(NAMES[method][name])) for name, item in delta.named_parameters()
    ]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(torch.randn(other.shape, generator=generator))
            mine.copy_(other.reshape(mine.shape))
    return ours, theirs, pairs


def change_of(theirs):
    """Return the change that the forward of their module applies.

    `get_diff_weight` of LoHa and LoKr multiplies by the scale once more.
    """
    if theirs.name == "locon":
        return theirs.get_diff_weight()[0]
    return theirs.get_weight(theirs.shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_outputs_and_gradients_agree(kind, case):
    method, rank, theirs_options, options = case
    build_layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = build_layer().double()
    if method == "loha" and kind == "prime":
        rank = 1
    ours, theirs, pairs = build(method, layer, rank, theirs_options, options)
    assert {id(other) for _, other in pairs} == {id(item) for item in theirs.parameters()}
    change = change_of(theirs).detach()
    delta = ours[0].adapters["default"]["weight"]
    assert_close(delta.delta(layer.weight.detach().flatten(1)), change.flatten(1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs.apply_to()
    theirs.eval()
    mine, other = ours(x), theirs.org_module[0](x)
    assert_close(mine, other)
    goal = torch.linspace(-1, 1, mine.numel(), dtype=torch.float64).reshape(mine.shape)
    (mine * goal).sum().backward()
    (other * goal).sum().backward()
    for one, two in pairs:
        assert bool(one.grad.any())
        assert_close(one.grad, two.grad.reshape(one.shape), factor=10)
    vl.eject(ours, merge=True)
    assert_close(ours[0].weight, layer.weight + change)
