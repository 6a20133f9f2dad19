"""Laws of the mixture of experts."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import gradients
from tests.contract.kinds import FEW
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.freeze import freeze_routing
from visionlora.hosts import Host
from visionlora.hosts.linear import LinearLayer

SITES = [kind for kind in FEW if not kind.norm]
ON_SITES = pytest.mark.parametrize("kind", SITES, ids=lambda kind: kind.name)


def build(kind, method="moe-lora", *, seed=0, **options):
    """Return an adapted model with random trainables."""
    options = {"rank": 2, "alpha": 3.0, **options}
    return disturb(vl.inject(kind.model(), method, kind.target, **options), seed)


@torch.no_grad()
def disturb(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, item in vl.trainable_parameters(model):
        item.copy_(0.5 * torch.randn(item.shape, generator=generator, dtype=item.dtype))
    return model


def deltas(model):
    return [
        delta
        for module in model.modules()
        if isinstance(module, Host)
        for group in module.adapters.values()
        for delta in group.values()
    ]


@ON_SITES
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_one_expert_is_lora(kind, granularity):
    one = build(kind, experts=1, granularity=granularity)
    plain = build(kind, "lora")
    with torch.no_grad():
        for expert, lora in zip(deltas(one), deltas(plain), strict=True):
            lora.A.copy_(expert.A[0])
            lora.B.copy_(expert.B[0])
    inputs = kind.inputs()
    actual, expected = one(*inputs), plain(*inputs)
    assert_close(actual, expected)
    for name in ("A", "B"):
        ours = gradients(actual, [getattr(delta, name) for delta in deltas(one)])
        theirs = gradients(expected, [getattr(delta, name) for delta in deltas(plain)])
        for mine, yours in zip(ours, theirs, strict=True):
            assert_close(mine[0], yours)
        actual, expected = one(*inputs), plain(*inputs)


@ON_SITES
@pytest.mark.parametrize("top_k", [None, 2])
def test_identical_experts_do_not_depend_on_the_router(kind, top_k):
    model = build(kind, experts=3, top_k=top_k)
    inputs = kind.inputs()
    with torch.no_grad():
        before = model(*inputs)
        for delta in deltas(model):
            delta.A.copy_(delta.A[:1].expand_as(delta.A))
            delta.B.copy_(delta.B[:1].expand_as(delta.B))
        expected = model(*inputs)
        assert not torch.allclose(before, expected)
        for delta in deltas(model):
            delta.router.mul_(-3.0)
    assert_close(model(*inputs), expected)


@ON_SITES
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_order_of_experts_does_not_matter(kind, top_k):
    model = build(kind, experts=4, top_k=top_k)
    inputs = kind.inputs()
    expected = model(*inputs)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for delta in deltas(model):
            for item in (delta.A, delta.B, delta.router):
                item.copy_(item[order])
    assert_close(model(*inputs), expected)


@ON_SITES
def test_choosing_all_experts_is_dense(kind):
    inputs = kind.inputs()
    assert torch.equal(build(kind, experts=3, top_k=3)(*inputs), build(kind, experts=3)(*inputs))


def reference(model, x):
    """Return the output of a linear layer by the definition, token by token."""
    (delta,) = deltas(model)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = delta.router @ token
        chosen = logits.topk(delta.options.top_k or len(logits)).indices
        gates = logits[chosen].softmax(0)
        parts = [
            gate * delta.scale * delta.B[expert] @ (delta.A[expert] @ token)
            for gate, expert in zip(gates, chosen, strict=True)
        ]
        rows.append(model.layer.weight @ token + sum(parts))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_linear_layer_follows_the_definition(top_k):
    kind = next(kind for kind in SITES if kind.name == "linear-wide")  # without bias
    model = build(kind, experts=4, top_k=top_k)
    (x,) = kind.inputs()
    assert_close(model(x), reference(model, x))


@ON_SITES
def test_constant_gates_make_the_frozen_factors_exact(kind):
    model = build(kind, experts=4)
    with torch.no_grad():
        for delta in deltas(model):
            delta.router.zero_()  # every gate is 1/4; E r is more than some sites can have
    inputs = kind.inputs()
    model.train()
    expected = model(*inputs).detach()
    frozen = freeze_routing(copy.deepcopy(model), [inputs])
    assert frozen.training
    assert {delta.config.method for delta in deltas(frozen)} == {"lora"}
    assert_close(frozen(*inputs), expected)
    with vl.merged(frozen):
        assert_close(frozen(*inputs), expected)
    assert_close(model(*inputs), expected)
    assert deltas(model)[0].watch is None


def test_frozen_gates_are_the_means_over_tokens():
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    model = build(kind, experts=3)
    batches = [kind.inputs(seed)[0] for seed in range(2)]
    (delta,) = deltas(model)
    gates = torch.cat([(x @ delta.router.t()).softmax(-1).reshape(-1, 3) for x in batches])
    up, down = delta.frozen_factors(gates.mean(0))
    expected = delta.scale * up @ down
    freeze_routing(model, batches)
    (found,) = deltas(model)
    assert_close(found.delta(model.layer.weight), expected)


def test_a_sample_shares_its_gates_and_a_token_has_its_own():
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    (x,) = kind.inputs()
    moved = x.clone()
    moved[0, 0, 0] += 5.0
    for granularity, others_move in (("token", False), ("sample", True)):
        model = build(kind, experts=3, granularity=granularity)
        difference = (model(moved) - model(x)).abs().amax(-1)
        assert bool((difference[0].flatten()[1:] > 1e-6).all()) is others_move
        assert not bool(difference[1:].any())  # and no other sample


def test_grouped_convolutions_share_one_gate_and_equal_the_sum_of_convolutions():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1).double()
    plain = copy.deepcopy(conv)
    model = disturb(vl.inject(nn.Sequential(conv), "moe-lora", "0", rank=2, experts=3, alpha=2.0))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    (delta,) = deltas(model)
    kernels = delta.router.view(3, 2, 3, 3)
    logits = sum(
        torch.conv2d(x[:, 2 * g : 2 * g + 2], kernels, padding=1) for g in range(2)
    )  # fmt: skip
    gates = (logits / 2).softmax(1)
    expected = plain(x)
    for expert in range(3):
        kernel = (delta.B[expert] @ delta.A[expert]).view_as(plain.weight)
        part = torch.conv2d(x, kernel, padding=1, groups=2)
        expected = expected + delta.scale * gates[:, expert : expert + 1] * part
    assert_close(model(x), expected)


@pytest.mark.parametrize("balance", ["load", "importance"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_balance_of_uniform_and_of_collapsed_routers(balance, top_k):
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    options = {"experts": 4, "top_k": top_k, "balance": balance, "balance_weight": 0.5}
    model = build(kind, **options)
    (delta,) = deltas(model)
    assert delta.penalty() is None
    with torch.no_grad():
        delta.router.zero_()
    model(*kind.inputs())
    # a uniform router: E * sum f P = 1; ties go to the first experts, P stays uniform
    if balance == "load":
        assert_close(delta.penalty(), torch.tensor(0.5, dtype=torch.float64))
    elif top_k is None:
        assert_close(delta.penalty(), torch.tensor(0.0, dtype=torch.float64))
    x = kind.inputs()[0].abs()
    with torch.no_grad():
        delta.router[0] = 100.0  # everything goes to the first expert
    model(x)
    # the load is f = (1/k, ...), P = (1, 0, 0, 0); the importance (4, 0, 0, 0): variance 3, mean 1
    expected = {"load": 4.0 / (top_k or 1), "importance": 3.0}[balance]
    assert_close(delta.penalty(), torch.tensor(0.5 * expected, dtype=torch.float64))


def test_the_penalty_trains_the_router_and_belongs_to_training():
    kind = next(kind for kind in SITES if kind.name == "qkv-slices")
    model = build(kind, experts=3, top_k=1, balance_weight=0.1)
    one, other = deltas(model)
    model.eval()
    model(*kind.inputs())
    assert one.penalty() is None
    model.train()
    model(*kind.inputs())
    (one.penalty() + other.penalty()).backward()
    assert bool(one.router.grad.any())
    assert one.A.grad is None
    twin = copy.deepcopy(model)  # a graph cannot be copied, so the copy starts without
    assert deltas(twin)[0].penalty() is None
    assert deltas(build(kind, experts=3))[0].penalty() is None


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient_of_loss_and_penalty(dropout):
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    model = build(kind, experts=3, top_k=2, balance_weight=0.1, dropout=dropout)
    tensors = [item for _, item in vl.trainable_parameters(model)]
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        loss = run(*kind.inputs()).square().sum() + deltas(model)[0].penalty()
        found.append(torch.autograd.grad(loss, tensors))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_router_sees_the_input_before_dropout():
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    model = build(kind, experts=3, dropout=0.5, balance_weight=1.0)
    (delta,) = deltas(model)
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        output = model(*kind.inputs())
        values.append((output.detach(), delta.penalty().detach()))
    assert not torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])


def test_the_router_runs_in_float32_beside_half_precision():
    kind = next(kind for kind in SITES if kind.name == "linear-wide")
    model = vl.inject(kind.model(dtype=torch.bfloat16), "moe-lora", "layer", rank=2, experts=3)
    (delta,) = deltas(disturb(model))
    layer = LinearLayer(model.layer.weight, training=True)
    (x,) = kind.inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        gates = delta.route(x, layer)
    assert gates.dtype == torch.float32
    assert_close(gates, (x.float() @ delta.router.t()).softmax(-1))


def test_counts():
    model = nn.Sequential(nn.Linear(6, 10))
    vl.inject(model, "moe-lora", "0", rank=2, experts=5)
    count = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert count == 5 * 2 * 16 + 5 * 6


def test_merging_and_bad_options_are_refused():
    model = vl.inject(nn.Sequential(nn.Linear(6, 6)), "moe-lora", "0", rank=2)
    with pytest.raises(AdapterStateError, match="routes by input"):
        vl.merge(model)
    with pytest.raises(AdapterStateError, match="no batch reached"):
        freeze_routing(model, [])
    vl.eject(model)
    vl.inject(model, "lora", "0", rank=2)
    with pytest.raises(AdapterStateError, match="no routed adapter"):
        freeze_routing(model, [])
    for options in ({"experts": 0}, {"top_k": 0}, {"top_k": 9}, {"balance_weight": -1.0}):
        with pytest.raises(ConfigError, match="moe-lora"):
            vl.build_config("moe-lora", options)
