"""Laws of Queryable LoRA: routing, depth, instruction, frozen gates, counts."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.contract.cases import gradients
from tests.contract.kinds import FEW
from tests.methods.test_moe_lora import ON_SITES, build, deltas
from tests.methods.towers import METHOD, Tower, batch, memory_of, tower, trained
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import AdapterStateError, ConfigError, VisionLoraError
from visionlora.freeze import freeze_routing
from visionlora.methods.parts.depth import block_index
from visionlora.ranks import controllers_of


@torch.no_grad()
def one_identity_atom(model):
    memory_of(model).atoms.copy_(torch.eye(2)[None])


@ON_SITES
def test_one_identity_atom_is_lora(kind):
    model, plain = build(kind, METHOD, atoms=1), build(kind, "lora")
    one_identity_atom(model)
    with torch.no_grad():
        for routed, lora in zip(deltas(model), deltas(plain), strict=True):
            lora.A.copy_(routed.A)
            lora.B.copy_(routed.B)
    inputs = kind.inputs()
    actual, expected = model(*inputs), plain(*inputs)
    assert_close(actual, expected)
    ours = gradients(actual, [item for delta in deltas(model) for item in (delta.A, delta.B)])
    theirs = gradients(expected, [item for delta in deltas(plain) for item in (delta.A, delta.B)])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_one_identity_atom_is_lora_in_depth():
    model, plain = tower(atoms=1), tower("lora")
    one_identity_atom(model)
    with torch.no_grad():
        for routed, lora in zip(deltas(model), deltas(plain), strict=True):
            lora.A.copy_(routed.A)
            lora.B.copy_(routed.B)
    assert_close(model(batch()), plain(batch()))


def definition(model, x):
    """Return the output of a tower of blocks of one, written out sample by sample."""
    memory, found = memory_of(model), []
    scale = deltas(model)[0].scale
    width = memory.options.width
    for sample in x:
        states = []
        h = model.stem(sample)
        for block in model.blocks:
            q, v = block.qkv.adapters["default"]["q"], block.qkv.adapters["default"]["v"]
            (out,) = block.out.adapters["default"].values()
            u = (h @ q.A.t()).mean(0)
            context = torch.zeros(width, dtype=u.dtype)
            if states:
                scores = torch.stack(
                    [(memory.similarity @ u) @ (memory.similarity @ past) for past in states]
                )
                for weight, past in zip((scores / width**0.5).softmax(0), states, strict=True):
                    context = context + weight * (memory.content @ past)
            states.append(u)
            normal = (u - u.mean()) / (u.var(correction=0) + 1e-5).sqrt()
            z = memory.keys @ (memory.query @ torch.cat([normal, context])) / width**0.5
            best = z.topk(memory.options.top_k).indices
            R = sum(a * memory.atoms[k] for a, k in zip(z[best].softmax(0), best, strict=True))

            def change(delta, x, R=R):
                return scale * x @ (delta.B @ R @ delta.A).t()

            parts = list(nn.functional.linear(h, block.qkv.weight, block.qkv.bias).chunk(3, -1))
            parts[0] = parts[0] + change(q, h)
            parts[2] = parts[2] + change(v, h)
            one, two, three = (part.tanh() for part in parts)
            inner = one * (two * three).mean(0, keepdim=True)
            h = h + nn.functional.linear(inner, block.out.weight, block.out.bias)
            h = h + change(out, inner)
        found.append(h)
    return torch.stack(found)


def test_a_tower_follows_the_definition_in_values_and_gradients():
    model = tower(top_k=3)
    x = batch()
    actual, expected = model(x), definition(model, x)
    assert_close(actual, expected)
    for one, other in zip(
        gradients(actual, trained(model)), gradients(expected, trained(model)), strict=True
    ):
        assert_close(one, other)


def test_a_sample_does_not_depend_on_its_batch():
    model = tower()
    x = batch()
    together = model(x)
    for index in range(len(x)):
        assert_close(model(x[index : index + 1]), together[index : index + 1])


def test_a_block_does_not_depend_on_later_ones_but_on_earlier_ones():
    model = tower()
    seen = []
    model.blocks[2].register_forward_hook(lambda *args: seen.append(args[-1].detach()))
    model(batch())
    with torch.no_grad():
        model.blocks[3].qkv.adapters["default"]["q"].A.mul_(-2.0)
    model(batch())
    assert torch.equal(seen[0], seen[1])
    # an earlier state matters even where the features are the same: only its summary is changed
    with torch.no_grad():
        earlier = model.blocks[0].qkv.adapters["default"]["q"]
        earlier.B.zero_()
        model(batch())
        gates = memory_of(model)._depth._passes["blocks"].gates[2].clone()
        earlier.A.mul_(-3.0)
        model(batch())
    assert not torch.equal(seen[2], seen[3])
    assert not torch.equal(memory_of(model)._depth._passes["blocks"].gates[2], gates)


def test_the_order_of_atoms_does_not_matter():
    model = tower(instruction=(0.5, -1.0, 2.0))
    expected = model(batch())
    memory, order = memory_of(model), torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        memory.atoms.copy_(memory.atoms[order])
        memory.keys.copy_(memory.keys[order])
    assert_close(model(batch()), expected)


def test_a_strong_prior_picks_its_best_atom_everywhere():
    model = tower(instruction=(0.5, -1.0, 2.0), prior_strength=1e6)
    memory = memory_of(model)
    best = int(memory.log_prior(memory.keys).argmax())
    expected = freeze_routing(copy.deepcopy(model), [batch()])
    assert_close(model(batch()), expected(batch()))
    for routed, lora in zip(deltas(model), deltas(expected), strict=True):
        assert_close(lora.B, routed.B @ memory.atoms[best])


def test_the_routed_operator_is_no_longer_than_its_longest_atom():
    model = tower()
    model(batch())
    memory = memory_of(model)
    for gates in memory._depth._passes["blocks"].gates.values():
        assert int((gates > 0).sum(1).max()) <= 4
        operators = torch.einsum("nk,krc->nrc", gates, memory.atoms)
        longest = torch.linalg.matrix_norm(memory.atoms, 2).max()
        assert bool((torch.linalg.matrix_norm(operators, 2) <= longest + 1e-12).all())


@pytest.mark.parametrize(
    ("module", "tower", "index"),
    [
        ("visual.blocks.7.attn.qkv", "visual.blocks", (7,)),
        ("blocks.3.mlp.0", "blocks", (3,)),
        ("blocks.2.1.conv", "blocks", (2, 1)),
        ("layers.2.blocks.5.mlp.fc1", "layers", (2, 5)),
        ("layers.2.downsample.reduction", "layers", (2,)),
        ("layer3.0.conv1", "layer", (3, 0)),
        ("vit.encoder.layer.11.output.dense", "vit.encoder.layer", (11,)),
        ("transformer.h.4.attn", "transformer.h", (4,)),
        ("0", "", (0,)),
        ("patch_embed.proj", "patch_embed.proj", ()),
        ("", "", ()),
    ],
)
def test_names_tell_the_blocks(module, tower, index):
    assert block_index(module) == (tower, index)


def test_constant_gates_make_the_frozen_factors_exact():
    model = tower(top_k=6)
    with torch.no_grad():
        memory_of(model).query.zero_()
    expected = model(batch())
    freeze_routing(model, [batch(1)])
    assert_close(model(batch()), expected)
    assert not hasattr(model, "visionlora_shared")
    with vl.merged(model):
        assert_close(model(batch()), expected)


def test_frozen_gates_are_means_over_samples():
    model = tower()
    with torch.no_grad():
        model(batch())
    gates = {
        key: item.mean(0) for key, item in memory_of(model)._depth._passes["blocks"].gates.items()
    }
    expected = [
        delta.B @ torch.einsum("k,krc->rc", gates[memory_of(model).places[delta.name][1]],
                               memory_of(model).atoms)
        for delta in deltas(model)
    ]  # fmt: skip
    freeze_routing(model, [batch()])
    for delta, up in zip(deltas(model), expected, strict=True):
        assert_close(delta.B, up)


def test_the_divergence_is_that_of_the_gates_from_the_prior():
    model = tower(divergence=0.5, top_k=6, instruction=(1.0, 2.0))
    model(batch())
    memory = memory_of(model)
    log_prior = memory.log_prior(memory.keys)
    terms = [
        (gates * (gates.log() - log_prior)).sum(1).mean()
        for gates in memory._depth._passes["blocks"].gates.values()
    ]
    assert_close(memory.penalty(), 0.5 * sum(terms) / len(terms))
    assert memory.penalty() is None  # one graph, one backward
    model(batch())
    assert bool(torch.autograd.grad(memory.penalty(), memory.prior)[0].any())


@pytest.mark.parametrize("targets", [("blocks.*.qkv[q,v]",), ("stem",)])
@pytest.mark.parametrize("instruction", [(), (1.0, 2.0, 3.0)])
def test_counts_and_gradients(targets, instruction):
    model = tower(targets=targets, instruction=instruction)
    deep = targets != ("stem",)
    shared = 6 * 4 + 4 * 6 + 4 * 2 + 4 * len(instruction) + deep * (16 + 2 * 4 * 2)
    assert sum(item.numel() for item in memory_of(model).parameters()) == shared
    config = deltas(model)[0].config
    sites = [host for host in model.modules() if hasattr(host, "state")]
    listed = [site for host in sites for site in host.state.sites["default"].values()]
    assert type(memory_of(model)).parameter_count(config, listed) == shared
    model(batch()).square().sum().backward()
    assert all(bool(item.grad.any()) for item in trained(model))


def test_an_instruction_survives_a_file(tmp_path):
    model = tower(instruction=(0.1, -2.0, 3.5)).eval()
    path = vl.save(model, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    fresh = vl.load(Tower(4).double(), path).eval()
    assert torch.equal(fresh(batch()), model(batch()))
    assert deltas(fresh)[0].config == deltas(model)[0].config


def test_bad_options_are_refused():
    for options in (
        {"atoms": 0},
        {"top_k": 0},
        {"block_size": 0},
        {"temperature": 0.0},
        {"divergence": -1.0},
        {"instruction": ("a",)},
    ):
        with pytest.raises(ConfigError, match=METHOD):
            vl.build_config(METHOD, options)
    with pytest.raises(AdapterStateError, match="routes by input"):
        vl.merge(tower())
    kind = next(kind for kind in FEW if kind.name == "linear-wide")
    with pytest.raises(VisionLoraError):
        vl.inject(kind.model(), METHOD, kind.target, mode="dense", rank=2)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (METHOD, {"divergence": 0.1}),
        ("moe-lora", {"experts": 3, "top_k": 1, "balance_weight": 0.1}),
    ],
)
def test_a_training_step_adds_the_penalty_and_reaches_everything(method, options):
    values = []
    for penalised in (True, False):
        model = tower(method, **options)
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        dynamics = controllers_of(model, optimizer, 2) if penalised else []
        stepper = Stepper(model, optimizer, dynamics=dynamics)
        for number in (0, 1):
            stepper.step([batch(number), batch(number)], lambda x: model(x).square().mean())  # noqa: B023
        values.append(torch.cat([item.detach().flatten() for item in trained(model)]))
    assert (values[0] - values[1]).abs().max() > 1e-6
