"""What Queryable LoRA remembers between layers: checkpointing, aborts, several towers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import gradients
from tests.methods.test_moe_lora import disturb
from tests.methods.towers import METHOD, Tower, batch, memory_of, tower, trained
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.methods.parts.depth import fit

CALLS = {
    "every block": lambda model, x: _with_checkpoints(model, x),
    "the whole": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "both": lambda model, x: checkpoint(_with_checkpoints, model, x, use_reentrant=False),
}


def _with_checkpoints(model, x):
    model.checkpointed = True
    try:
        return model(x)
    finally:
        model.checkpointed = False


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_and_plain_backward_agree(how, block_size, dropout):
    model = tower(block_size=block_size, dropout=dropout, divergence=0.1)
    model.checkpointed = how == "both"
    found = []
    for run in (lambda model, x: model(x), CALLS[how]):
        torch.manual_seed(0)
        model.checkpointed = False
        if how != "the whole" and run is not CALLS["every block"]:
            model.checkpointed = run is CALLS[how]
        loss = run(model, batch()).square().sum() + memory_of(model).penalty()
        found.append(torch.autograd.grad(loss, trained(model)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("block_size", [1, 2])
def test_several_checkpointed_forwards_before_one_backward(block_size):
    model = tower(block_size=block_size)
    inputs = [batch(0), batch(1), batch(2)]
    plain = gradients(sum(model(x) for x in inputs), trained(model))
    outputs = [_with_checkpoints(model, x) for x in inputs]
    model.checkpointed = True
    model(batch(3))  # another one, which is thrown away
    for one, other in zip(gradients(sum(outputs), trained(model)), plain, strict=True):
        assert_close(one, other)


def test_two_backwards_through_one_checkpointed_forward():
    model = tower()
    model.checkpointed = True
    loss = model(batch()).square().sum()
    first = torch.autograd.grad(loss, trained(model), retain_graph=True)
    second = torch.autograd.grad(loss, trained(model))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_reentrant_checkpointing_is_refused():
    model = tower()
    x = batch().requires_grad_()
    output = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(AdapterStateError, match="use_reentrant=False"):
        output.sum().backward()


def test_traces_live_as_long_as_their_graphs():
    model = tower()
    depth = memory_of(model)._depth
    kept = [model(batch(seed)) for seed in range(3)]
    assert len(depth._traces) == 3
    del kept
    model(batch())
    assert len(depth._traces) == 1


def test_training_for_some_steps_leaves_no_graph_and_no_state_behind():
    model = tower()
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for step in range(3):
        loss = model(batch(step)).square().mean() + memory_of(model).penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(batch())
    assert memory_of(model).penalty() is None
    assert_close(model(batch()), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch()), expected)


def test_an_aborted_forward_leaves_nothing_to_the_next():
    model = tower()
    expected = model(batch())

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.blocks[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(batch(1))
    handle.remove()
    assert torch.equal(model(batch()), expected)
    # nor does a forward that leaves blocks out
    model.blocks[3](model.blocks[2](batch(1)))
    assert torch.equal(model(batch()), expected)


def test_towers_do_not_mix():
    torch.manual_seed(0)
    pair = nn.ModuleDict({"image": Tower(2), "text": Tower(2)}).double()
    vl.inject(pair, METHOD, ["*.qkv[q]", "*.stem"], rank=2, atoms=5, width=4, block_size=1)
    disturb(pair)
    alone = pair["image"](batch())
    x = pair["image"].stem(batch())
    other = pair["text"].stem(batch(1, samples=7))
    for one, two in zip(pair["image"].blocks, pair["text"].blocks, strict=True):
        x, other = one(x), two(other)  # interleaved, with other batch sizes
    assert torch.equal(x, alone)


def test_windows_of_a_sample_share_its_state():
    parts = torch.arange(6.0).view(6, 1)
    assert torch.equal(fit(parts, 6), parts)
    assert torch.equal(fit(parts, 3), torch.tensor([[0.5], [2.5], [4.5]]))
    assert torch.equal(fit(parts[:2], 4), torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    with pytest.raises(ConfigError, match="batch"):
        fit(parts, 4)
