"""Laws of HypeLoRA, and of the cache that its factors come from."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.methods.test_moe_lora import deltas, disturb
from tests.methods.test_queryable_lora import Tower, batch
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import ConfigError
from visionlora.ranks import controllers_of
from visionlora.training import RunDirectory, TrainSettings, fit

TARGETS = ["blocks.*.qkv[q,v]", "blocks.*.out", "stem"]
KINDS = pytest.mark.parametrize("generator", ["mlp", "transformer"])


def tower(random=True, targets=TARGETS, method="hype-lora", **options):
    torch.manual_seed(0)
    options = {"rank": 2, "alpha": 3.0, **options}
    if method == "hype-lora":
        options = {"width": 8, "embedding": 5, **options}
    model = vl.inject(Tower(3).double(), method, targets, **options)
    return disturb(model) if random else model


def network_of(model):
    return model.visionlora_shared["default"]


def trained(model):
    return [item for _, item in vl.trainable_parameters(model)]


def gradients(loss, model):
    return torch.autograd.grad(loss, trained(model))


def counted(model):
    """Count how often the factors are generated."""
    calls = []
    network_of(model).trunk.register_forward_hook(lambda *_: calls.append(1))
    return calls


@KINDS
@pytest.mark.parametrize("down", ["generated", "fixed"])
def test_nothing_changes_at_first(generator, down):
    model = tower(random=False, generator=generator, down=down)
    torch.manual_seed(0)
    assert torch.equal(model(batch()), Tower(3).double()(batch()))


@KINDS
def test_the_gradient_reaches_the_embedding_of_every_site(generator):
    model = tower(generator=generator)
    model(batch()).square().sum().backward()
    network = network_of(model)
    rows = network.embeddings.grad.abs().sum((1, 2))
    assert len(rows) == 10
    assert bool((rows > 0).all())
    assert all(bool(item.grad.any()) for item in trained(model))


def test_sites_of_an_mlp_are_apart_and_those_of_a_transformer_are_not():
    for generator, together in (("mlp", False), ("transformer", True)):
        model = tower(generator=generator)
        network = network_of(model)
        up, _ = network.factors("blocks.0.out.weight")
        (gradient,) = torch.autograd.grad(up.sum(), network.embeddings)
        reached = gradient.abs().sum((1, 2)) > 0
        assert int(reached.sum()) == (10 if together else 1)
        assert bool(reached[network.index["blocks.0.out.weight"]])


def reference(network, number):
    """Return the features of one site by the definition."""
    width = network.options.width
    flat = network.embeddings.flatten(0, 1)
    if network.options.generator == "mlp":
        for layer in network.trunk.layers:
            flat = nn.functional.gelu(flat @ layer.weight.t() + layer.bias)
        return flat[number]
    encoder = nn.TransformerEncoderLayer(
        width, 1, dim_feedforward=8 * width, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    flat = flat @ network.trunk.project.weight.t() + network.trunk.project.bias
    for layer in network.trunk.layers:
        encoder.load_state_dict(
            {
                "self_attn.in_proj_weight": layer.qkv.weight,
                "self_attn.in_proj_bias": layer.qkv.bias,
                "self_attn.out_proj.weight": layer.out.weight,
                "self_attn.out_proj.bias": layer.out.bias,
                "linear1.weight": layer.wide.weight,
                "linear1.bias": layer.wide.bias,
                "linear2.weight": layer.narrow.weight,
                "linear2.bias": layer.narrow.bias,
                "norm1.weight": layer.norm1.weight,
                "norm1.bias": layer.norm1.bias,
                "norm2.weight": layer.norm2.weight,
                "norm2.bias": layer.norm2.bias,
            }
        )
        flat = encoder(flat[None])[0]
    return flat[2 * number : 2 * number + 2]


@KINDS
def test_factors_follow_the_definition(generator):
    model = tower(generator=generator)
    network = network_of(model)
    for delta in deltas(model):
        features = reference(network, network.index[delta.name])
        first, last = (features, features) if generator == "mlp" else features
        up, down = delta.factors()
        head = network.heads[f"{up.shape[0]}x{down.shape[1]}"]
        assert_close(up, (head["up"].weight @ last + head["up"].bias).view(up.shape))
        assert_close(down, (head["down"].weight @ first + head["down"].bias).view(down.shape))


@pytest.mark.parametrize("blend", ["add", "multiply"])
@pytest.mark.parametrize("down", ["generated", "fixed"])
def test_blends(blend, down):
    if (blend, down) == ("multiply", "fixed"):
        with pytest.raises(ConfigError, match="blend='multiply'"):
            tower(blend=blend, down=down)
        return
    model = tower(blend=blend, down=down, blend_weight=0.25)
    for delta in deltas(model):
        up, made = network_of(model).factors(delta.name)
        own_up, own_down = delta.factors()
        assert_close(own_up, 0.75 * up if blend == "add" else up)
        if down == "fixed":
            assert torch.equal(own_down, delta.A)
        elif blend == "add":
            assert_close(own_down, 0.75 * made + 0.25 * delta.A)
        else:
            assert_close(own_down, made * delta.A)


def test_a_whole_share_of_the_initial_factors_is_lora_as_it_starts():
    model = tower(blend="add", blend_weight=1.0)  # whatever the network emits
    plain = tower(random=False, method="lora")
    for one, other in zip(deltas(model), deltas(plain), strict=True):
        assert torch.equal(one.factors()[1], other.A)
        assert torch.equal(one.factors()[0], other.B)


def test_generated_factors_are_as_large_as_those_of_lora():
    model = vl.inject(nn.Sequential(nn.Linear(256, 64)), "hype-lora", "0")
    (delta,) = deltas(model)
    size = float(delta.factors()[1].detach().square().mean() * 3 * 256)  # 1 for LoRA's
    assert 0.1 < size < 3.0


@KINDS
@pytest.mark.parametrize("down", ["generated", "fixed"])
def test_an_exported_lora_is_the_live_model(generator, down):
    model, plain = tower(generator=generator, down=down), tower(method="lora")
    with torch.no_grad():
        for one, other in zip(deltas(model), deltas(plain), strict=True):
            up, made = one.factors()
            other.B.copy_(up)
            other.A.copy_(made)
    assert_close(plain(batch()), model(batch()))
    with vl.merged(model):
        assert_close(model(batch()), plain(batch()))


@pytest.mark.parametrize("options", [{"down": "fixed"}, {"blend": "add"}, {}])
def test_files_restore_everything(options, tmp_path):
    model = tower(**options).eval()
    path = vl.save(model, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    fresh = vl.load(Tower(3).double(), path).eval()
    assert torch.equal(fresh(batch()), model(batch()))
    for one, other in zip(deltas(model), deltas(fresh), strict=True):
        assert (one.A is None) is (not options)
        if options:
            assert torch.equal(one.A, other.A)


def test_the_order_of_targets_does_not_matter():
    one, other = tower(), tower(targets=list(reversed(TARGETS)))
    assert torch.equal(one(batch()), other(batch()))


def test_a_redrawn_matrix_is_new_in_training_and_fixed_in_evaluation():
    model = tower(down="fixed", redraw=True)
    assert not torch.equal(model(batch()), model(batch()))
    model.eval()
    fixed = tower(down="fixed").eval()
    assert torch.equal(model(batch()), fixed(batch()))
    with pytest.raises(ConfigError, match="redraw"):
        tower(redraw=True)


@KINDS
@pytest.mark.parametrize("down", ["generated", "fixed"])
@pytest.mark.parametrize("depth", [1, 3])
def test_counts(generator, down, depth):
    model = tower(generator=generator, down=down, depth=depth)
    sites = [
        site
        for module in model.modules()
        if hasattr(module, "state")
        for site in module.state.sites["default"].values()
    ]
    network = network_of(model)
    expected = type(network).parameter_count(network.options, sites)
    assert sum(item.numel() for item in trained(model)) == expected
    if (generator, down, depth) == ("mlp", "generated", 1):
        assert expected == 10 * 5 + 6 * 8 + 9 * 2 * (6 + 6)  # all sites have one shape


def test_the_papers_generators_are_many_times_larger_than_what_they_emit():
    shape = {"out_features": 768, "in_features": 768}
    method = vl.get_method("hype-lora")
    sites = [vl.sites.Site(f"{i}", "weight", "linear", **shape) for i in range(24)]
    config = vl.build_config("hype-lora", {"width": 2048, "depth": 3, "embedding": 128})
    assert method.shared.parameter_count(config, sites) == 33_838_080
    small = method.shared.parameter_count(vl.build_config("hype-lora"), sites)
    assert small == 24 * 16 + 17 * 32 + 33 * 32 + 33 * 8 * 2 * 768


def test_factors_are_generated_once_per_step():
    model = tower()
    calls = counted(model)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for step in range(3):
        loss = model(batch(step)).square().mean() + model(batch(step + 1)).square().mean()
        loss.backward()
        assert len(calls) == step + 1
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(3):
            model(batch())
    assert len(calls) == 4


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_plain_backward_agree(generator, reentrant):
    model = tower(generator=generator)
    x = batch().requires_grad_()  # which reentrant checkpointing needs

    def found(run):
        run(x).square().sum().backward()
        taken = [item.grad.clone() for item in trained(model)]
        model.zero_grad()
        return taken

    def blockwise(x):
        x = model.stem(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    plain = found(model)
    if reentrant:  # the stem alone would leave a used graph for the blocks
        blockwise = lambda x: checkpoint(model, x, use_reentrant=True)  # noqa: E731
    for one, other in zip(found(blockwise), plain, strict=True):
        assert_close(one, other)


def test_several_checkpointed_forwards_and_two_backwards():
    model = tower()
    plain = gradients(model(batch(0)).sum() + model(batch(1)).sum(), model)
    model.checkpointed = True
    loss = model(batch(0)).sum() + model(batch(1)).sum()
    for keep in (True, False):
        found = torch.autograd.grad(loss, trained(model), retain_graph=keep)
        for one, other in zip(found, plain, strict=True):
            assert_close(one, other)


def test_graphs_of_forwards_without_a_backward_are_freed():
    model = tower()
    kept = model(batch())
    tensor = network_of(model).cache._tensors[0]
    node = torch.utils.weak.WeakTensorKeyDictionary()
    node[tensor] = True
    del kept, tensor
    with torch.no_grad():
        model(batch())
    assert not len(node)


def test_copies_generate_for_themselves():
    model = tower()
    expected = model(batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch()), expected)
        disturb(twin, seed=3)
        assert not torch.equal(twin(batch()), expected)
    assert torch.equal(model(batch()), expected)


def steps(model, start, stop, total):
    """Train from one step to another of a run, and return the stepper."""
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    stepper = Stepper(model, optimizer, dynamics=controllers_of(model, optimizer, total))
    stepper.steps = start
    for step in range(start, stop):
        stepper.step([batch(step)], lambda x: model(x).square().mean())
    return stepper


def test_the_share_of_the_initial_factors_falls_to_zero_and_is_saved(tmp_path):
    model = tower(blend="add", blend_weight=0.8)
    stepper = steps(model, 0, 1, total=4)
    assert all(delta.config.blend_weight == pytest.approx(0.6) for delta in deltas(model))
    path = vl.save(model.eval(), tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    fresh = vl.load(Tower(3).double(), path).eval()
    assert torch.equal(fresh(batch()), model(batch()))
    for step in range(1, 4):
        stepper.step([batch(step)], lambda x: model(x).square().mean())
    assert {delta.config.blend_weight for delta in deltas(model)} == {0.0}
    for delta in deltas(model):
        up, down = delta.factors()
        assert torch.equal(down, network_of(model).factors(delta.name)[1])
        assert torch.equal(up, network_of(model).factors(delta.name)[0])


def test_only_the_add_blend_is_scheduled():
    model = tower(blend="multiply")
    before = dataclasses.asdict(deltas(model)[0].config)
    steps(model, 0, 2, total=2)
    assert dataclasses.asdict(deltas(model)[0].config) == before


def test_targets_do_not_find_the_network():
    model = tower()
    vl.inject(model, "lora", "type:Linear", name="second", rank=2)
    assert not any("visionlora_shared" in name for name, _ in model.named_modules()
                   if ".adapters." in name)  # fmt: skip


def test_bad_options_are_refused():
    for options in ({"width": 0}, {"depth": 0}, {"embedding": 0}, {"blend_weight": 1.5}):
        with pytest.raises(ConfigError, match="hype-lora"):
            vl.build_config("hype-lora", options)


def fitted(folder, *, resume=False, dies_at=None):
    """Train for 6 steps, or until the data of a step are asked for."""
    model = tower(random=False, blend="add", down="fixed", alpha=1.0)

    def batches(step):
        if step == dies_at:
            raise OSError("power cut")
        return batch(step)

    fit(
        model,
        torch.optim.AdamW(trained(model), lr=1e-2),
        lambda model, x: (model(x) - x).square().mean(),
        batches,
        TrainSettings(steps=6, device="cpu", checkpoint_every=2, log_every=1),
        RunDirectory(folder, resume=resume),
    )
    return model


def test_a_resumed_run_blends_as_the_whole_one(tmp_path):
    whole = fitted(tmp_path / "whole")
    assert deltas(whole)[0].config.blend_weight == 0.0
    with pytest.raises(OSError, match="power cut"):
        fitted(tmp_path / "stopped", dies_at=5)
    resumed = fitted(tmp_path / "stopped", resume=True)
    assert deltas(resumed)[0].config.blend_weight == 0.0
    for one, other in zip(trained(whole), trained(resumed), strict=True):
        assert torch.equal(one, other)
