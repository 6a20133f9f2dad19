"""What an adapted layer computes: compared with torch's own layer holding `W + delta(W)`."""

import dataclasses

import pytest
import torch

import visionlora as vl
from tests.contract.cases import (
    CONFIGS,
    DEFAULT_MATRICES,
    DEFAULTS,
    MATRICES,
    adapted,
    assert_unchanged,
    changed_weights,
    definition,
    deltas_of,
    gradients,
    host_of,
    inject,
    is_routed,
    modes,
    pairs,
    randomise,
    refused,
    snapshot,
    without_noise,
)
from tests.contract.kinds import FEW, KINDS
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError, TargetError


def trained(model):
    """Return the trainable tensors."""
    return [parameter for _, parameter in vl.trainable_parameters(model)]


@pairs(CONFIGS, KINDS)
def test_a_fresh_adapter_changes_nothing(config, kind):
    base, inputs = kind.model(), kind.inputs()
    model = inject(kind.model(), config, kind)
    deltas = deltas_of(model).values()
    for training in (True, False):
        expected, actual = base.train(training)(*inputs), model.train(training)(*inputs)
        if not all(delta.zero_at_init for delta in deltas):
            assert not torch.equal(actual, expected)
        elif "mha" not in kind.name and all(d.update is d.rotate is None for d in deltas):
            assert torch.equal(actual, expected)
        else:  # a rescaled output, a rotated input, or attention in another order of operations
            assert_close(actual, expected)


@pairs(MATRICES, KINDS)
def test_every_path_equals_the_definition(config, kind):
    inputs = kind.inputs()
    for mode in modes(config, kind):
        model = adapted(config, kind, mode=mode)
        actual = model(*inputs)
        assert_close(actual, definition(model, kind, inputs))
        assert not torch.allclose(actual, kind.model()(*inputs), atol=1e-3), "a test of nothing"


@pairs(MATRICES, KINDS)
def test_gradients_equal_autograd_through_the_definition(config, kind):
    inputs = kind.inputs()
    if not kind.indices:
        inputs = tuple(item.requires_grad_() for item in inputs)
    for mode in modes(config, kind):
        model = adapted(config, kind, mode=mode)
        tensors = [*trained(model), *(item for item in inputs if item.requires_grad)]
        expected = gradients(definition(model, kind, inputs), tensors)
        for one, other in zip(gradients(model(*inputs), tensors), expected, strict=True):
            assert_close(one, other)


@pairs(DEFAULT_MATRICES, KINDS)
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(config, kind):
    inputs = kind.inputs()
    model = adapted(config, kind).eval()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    expected = model(*inputs)
    vl.merge(model)
    assert_close(model(*inputs), expected)
    with pytest.raises(AdapterStateError):
        vl.merge(model)
    vl.unmerge(model)
    for name, item in model.state_dict().items():
        assert torch.equal(item, before[name]), name
    assert torch.equal(model(*inputs), expected)
    with pytest.raises(AdapterStateError):
        vl.unmerge(model)


@pairs(DEFAULTS, KINDS)
def test_disabled_adapters_leave_the_base(config, kind):
    inputs = kind.inputs()
    model = adapted(config, kind).eval()
    with torch.no_grad():  # where attention takes the same kernel with and without frozen weights
        expected = model(*inputs)
        with vl.disabled(model):
            disabled = model(*inputs)
        assert torch.equal(model(*inputs), expected)
        unused = vl.use(model, None)(*inputs)
        # torch's matmul may order its sums by requires_grad, so the flags must agree
        plain = vl.eject(model).requires_grad_(False)(*inputs)
    assert torch.equal(disabled, plain)
    assert torch.equal(unused, plain)
    assert_close(plain, kind.model().eval()(*inputs))


@pairs(DEFAULT_MATRICES, KINDS)
def test_two_adapters_add_up_at_their_scales(config, kind):
    inputs = kind.inputs()
    model = inject(inject(kind.model(), config, kind, name="a"), config, kind, name="b")
    randomise(model)
    assert_close(model(*inputs), definition(model, kind, inputs, {"a": 1.0, "b": 1.0}))
    vl.set_scale(model, 0.5, "a")
    vl.set_scale(model, -2.0, "b")
    expected = definition(model, kind, inputs, {"a": 0.5, "b": -2.0})
    assert_close(model(*inputs), expected)
    with vl.merged(model):
        assert_close(model(*inputs), expected)
    vl.use(model, "a")
    assert_close(model(*inputs), definition(model, kind, inputs, {"a": 0.5}))


# Every method beside the two that follow it: each path meets each other path somewhere.
NEIGHBOURS = [
    pytest.param(one, DEFAULT_MATRICES[(index + step) % len(DEFAULT_MATRICES)], kind)
    for kind in KINDS
    if kind.name in ("qkv-slices", "conv-strided")
    for index, one in enumerate(DEFAULT_MATRICES)
    for step in (1, 2)
]


@pytest.mark.parametrize(("config", "other", "kind"), NEIGHBOURS)
def test_different_methods_live_on_one_layer(config, other, kind):
    if refused(config, kind) or refused(other, kind):
        return
    inputs = kind.inputs()
    model = inject(inject(kind.model(), config, kind, name="a"), other, kind, name="b").eval()
    randomise(model)
    expected = definition(model, kind, inputs, {"a": 1.0, "b": 1.0})
    assert_close(model(*inputs), expected)
    with vl.merged(model):
        assert_close(model(*inputs), expected)


@pairs([config for config in CONFIGS if is_routed(config)], FEW)
def test_a_routed_change_is_no_matrix(config, kind):
    model, inputs = adapted(config, kind), kind.inputs()
    expected = model(*inputs)
    before = snapshot(model)
    for verb in (vl.merge, lambda model: vl.eject(model, merge=True)):
        with pytest.raises(AdapterStateError, match="routes by input"):
            verb(model)
    assert_unchanged(model, before)
    assert torch.equal(model(*inputs), expected)
    with pytest.raises(ConfigError, match="routes by input"):
        inject(kind.model(), config, kind, mode="dense")


@pairs(DEFAULT_MATRICES, [kind for kind in KINDS if not kind.indices])
def test_trainable_base_weights_get_the_gradient_of_the_definition(config, kind):
    for mode in modes(config, kind):
        check_base_gradients(config, kind, mode)


def check_base_gradients(config, kind, mode):
    inputs = kind.inputs()
    model = adapted(config, kind, mode=mode, freeze=False)
    host = host_of(model)
    names = [name for name, _ in kind.model().layer.named_parameters()]
    stored = dict(host.named_parameters())
    actual = gradients(model(*inputs), [stored[name] for name in names])
    # The definition as a function of the base: the same deltas around weights that need a gradient.
    base = kind.model()
    weights = dict(base.layer.named_parameters())
    changed = changed_weights(model, kind, base, detach=False)
    output = torch.func.functional_call(
        base, {f"layer.{name}": item for name, item in changed.items()}, inputs
    )
    expected = gradients(output, [weights[name] for name in names])
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pairs([config for config in DEFAULT_MATRICES if hasattr(config, "dropout")], FEW)
def test_dropout_acts_while_training_and_never_in_evaluation(config, kind):
    dropping = dataclasses.replace(config, dropout=0.5)
    if kind.indices:
        with pytest.raises(ConfigError, match="dropout"):
            inject(kind.model(), dropping, kind)
        return
    inputs = kind.inputs()
    model = adapted(dropping, kind)
    first, second = model(*inputs), model(*inputs)
    assert not torch.equal(first, second)
    assert_close(model.eval()(*inputs), definition(model, kind, inputs))
    # The mean over masks is the layer without dropout, where the output is linear in the input.
    if kind.name != "mha-self":
        without_noise(model.train())
        torch.manual_seed(0)
        many = torch.stack([model(*inputs) for _ in range(100)])
        error = (many.mean(0) - definition(model, kind, inputs)).abs()
        assert bool((error < 7 * many.std(0) / 100**0.5 + 1e-9).all())
    with pytest.raises(ConfigError, match="dropout"):
        inject(kind.model(), dropping, kind, mode="dense")


REFUSED = pairs(CONFIGS, KINDS, served=False)


@REFUSED
def test_a_site_that_cannot_be_served_is_refused_and_nothing_changes(config, kind):
    model = kind.model()
    before = snapshot(model)
    with pytest.raises((ConfigError, TargetError), match=r"layer|Norm"):
        inject(model, config, kind)
    assert_unchanged(model, before)
