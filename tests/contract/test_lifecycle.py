"""What survives: saving, ejecting, copying, casting, checkpointing, autocast."""

import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import (
    CONFIGS,
    DEFAULT_MATRICES,
    DEFAULTS,
    adapted,
    assert_unchanged,
    clone,
    definition,
    deltas_of,
    gradients,
    inject,
    is_routed,
    pairs,
    randomise,
    snapshot,
)
from tests.contract.kinds import FEW, KINDS
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError


@pairs(DEFAULTS, KINDS)
def test_eject_restores_the_model(config, kind):
    model = kind.model()
    model.layer.get_parameter(next(iter(dict(model.layer.named_parameters())))).requires_grad_(
        False
    )
    before = snapshot(model)
    inject(model, config, kind)
    inject(model, config, kind, name="second", mode="auto")
    randomise(model)
    model(*kind.inputs())
    if is_routed(config):
        vl.eject(model)
        assert_unchanged(model, before)
        return
    vl.merge(model)
    vl.unmerge(model)
    vl.eject(model)
    assert_unchanged(model, before)
    # ejecting while merged, and injecting anew
    inject(model, config, kind, mode="dense")
    randomise(model)
    vl.merge(model)
    vl.eject(model)
    assert_unchanged(model, before)


@pairs(DEFAULT_MATRICES, FEW)
def test_eject_with_merge_keeps_the_function(config, kind):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    expected = model(*inputs)
    plain = kind.model()
    vl.eject(model, merge=True)
    assert_close(model(*inputs), expected)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.layer) is type(plain.layer)


@pairs(CONFIGS, KINDS)
def test_a_saved_adapter_gives_the_same_output_in_a_fresh_model(config, kind, tmp_path):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    path = vl.save(model, tmp_path / "adapter.safetensors")
    count = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert path.stat().st_size <= 8 * count + 64 * 1024  # these adapters are float64
    fresh = vl.load(kind.model(), path).eval()
    assert torch.equal(fresh(*inputs), model(*inputs))
    assert vl.trainable_parameters(fresh)
    # over an adapter that holds other values, in a float64 or a float32 model
    other = adapted(config, kind, seed=9).eval()
    assert not torch.equal(other(*inputs), model(*inputs))
    assert torch.equal(vl.load(other, path)(*inputs), model(*inputs))
    # A and B of the file itself: no storage twice; constants only where they cannot be drawn
    deltas = [delta for delta in deltas_of(model).values() if delta.carried]
    constant = sum(item.numel() for delta in deltas for item in delta.frozen().values())
    tensors = load_file(path)
    assert sum(item.numel() for item in tensors.values()) == count + constant


@pairs(DEFAULTS, FEW)
def test_an_adapter_dictionary_round_trips_and_is_checked(config, kind):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    other = adapted(config, kind, seed=9).eval()
    values = {key: item.detach().clone() for key, item in vl.adapter_state_dict(model).items()}
    vl.load_adapter_state_dict(other, values)
    assert torch.equal(other(*inputs), model(*inputs))
    before = snapshot(other)
    key = next(iter(values))
    broken = [
        {name: item for name, item in values.items() if name != key},
        {**values, "adapter.layer.weight.C": values[key]},
        {**values, key: values[key][:-1]},
        {**values, key: torch.full_like(values[key], float("nan"))},
    ]
    for tensors in broken:
        with pytest.raises(AdapterFileError):
            vl.load_adapter_state_dict(other, tensors)
        assert_unchanged(other, before)


@pairs(DEFAULTS, FEW)
def test_copies_and_pickles_are_independent_and_complete(config, kind):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    expected = model(*inputs)
    for twin in (clone(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.layer) is type(model.layer)
        assert torch.equal(twin(*inputs), expected)
        randomise(twin, seed=4)  # the copy's slots refer to the copy's tensors
        assert not torch.equal(twin(*inputs), expected)
        assert torch.equal(model(*inputs), expected)
        if not is_routed(config):
            vl.merge(twin)
        vl.eject(twin)
        assert torch.equal(twin(*inputs), kind.model().eval()(*inputs))


@pairs(DEFAULTS, FEW)
def test_the_state_dict_round_trips_strictly_and_stores_nothing_twice(config, kind):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    other = adapted(config, kind, seed=9).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs), model(*inputs))
    storages = [item.untyped_storage().data_ptr() for item in model.state_dict().values()]
    assert len(storages) == len(set(storages))
    # and the base's own keys stay loadable from a checkpoint of the base
    missing = other.load_state_dict(kind.model().state_dict(), strict=False)
    assert not missing.unexpected_keys
    adapters = (".adapters.", "visionlora_shared.")
    assert all(any(part in key for part in adapters) for key in missing.missing_keys)


@pairs(DEFAULTS, FEW)
def test_inference_mode_and_no_grad_give_the_same_numbers(config, kind):
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    expected = model(*inputs)
    with torch.inference_mode():
        assert torch.equal(model(*inputs), expected)
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    assert torch.equal(model(*inputs), expected)


@pairs(DEFAULTS, KINDS)
def test_a_half_precision_base_keeps_its_type_and_its_adapter_float32(config, kind):
    model = inject(kind.model(dtype=torch.bfloat16), config, kind)
    randomise(model)
    assert {item.dtype for _, item in vl.trainable_parameters(model)} == {torch.float32}
    inputs = kind.inputs(dtype=torch.bfloat16)
    output = model(*inputs)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for _, item in vl.trainable_parameters(model):
        assert item.grad is not None
        assert item.grad.dtype == torch.float32
    exact = inject(kind.model(dtype=torch.bfloat16).float(), config, kind)
    vl.load_adapter_state_dict(exact, vl.adapter_state_dict(model))
    assert_close(output, exact(*kind.inputs(dtype=torch.float32)), factor=3)


@pairs(DEFAULTS, FEW)
def test_casting_an_adapted_model_casts_everything(config, kind):
    model = adapted(config, kind).to(torch.bfloat16)
    output = model(*kind.inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert_close(output, adapted(config, kind)(*kind.inputs()), factor=8)


@pairs(DEFAULTS, FEW)
def test_autocast_gives_the_type_of_the_base_and_full_precision_gradients(config, kind):
    base = kind.model(dtype=torch.float32)
    model = inject(kind.model(dtype=torch.float32), config, kind)
    randomise(model)
    inputs = kind.inputs(dtype=torch.float32)
    expected = model(*inputs)
    for mode in ("auto", "dense") if not is_routed(config) else ("auto",):
        if mode == "dense":
            values = vl.adapter_state_dict(model)
            model = inject(kind.model(dtype=torch.float32), config, kind, mode="dense")
            vl.load_adapter_state_dict(model, values)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs)
            assert output.dtype == base(*inputs).dtype
        output.float().sum().backward()
        assert {item.grad.dtype for _, item in vl.trainable_parameters(model)} == {torch.float32}
        torch.testing.assert_close(
            output.float(), expected, atol=5e-2 * float(expected.detach().abs().max()), rtol=0.1
        )


@pairs(DEFAULT_MATRICES, FEW)
def test_merging_inside_autocast_is_as_exact_as_outside(config, kind):
    model = inject(kind.model(dtype=torch.float32), config, kind)
    randomise(model)
    with vl.merged(model):
        expected = {name: item.clone() for name, item in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16), vl.merged(model):
        for name, item in model.state_dict().items():
            assert torch.equal(item, expected[name]), name


@pairs(DEFAULTS, FEW)
def test_gradient_checkpointing_changes_no_gradient(config, kind):
    model, inputs = adapted(config, kind), kind.inputs()
    tensors = [item for _, item in vl.trainable_parameters(model)]
    expected = gradients(model(*inputs), tensors)
    output = checkpoint(model, *inputs, use_reentrant=False)
    for one, other in zip(gradients(output, tensors), expected, strict=True):
        assert torch.equal(one, other)


@pairs(DEFAULTS, FEW)
def test_hooks_of_the_layer_still_run(config, kind):
    model = kind.model()
    seen = []
    model.layer.register_forward_hook(lambda *_: seen.append("after"))
    model.layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    inject(model, config, kind)(*kind.inputs())
    assert seen == ["before", "after"]


@pairs(DEFAULTS, FEW)
def test_looking_at_a_model_changes_nothing(config, kind):
    model = adapted(config, kind).train()
    before = snapshot(model)
    repr(model)
    str(vl.summary(model))
    vl.adapter_state_dict(model)
    model.eval()
    model.train()
    assert_unchanged(model, before)


@pairs(DEFAULTS, FEW)
def test_functional_call_reaches_the_adapter(config, kind):
    model, inputs = adapted(config, kind), kind.inputs()
    parameters = {name: item.detach() for name, item in vl.trainable_parameters(model)}
    moved = {name: item + 0.1 for name, item in parameters.items()}
    output = torch.func.functional_call(model, moved, inputs)
    assert not torch.equal(output, model(*inputs))
    with torch.no_grad():
        for name, item in vl.trainable_parameters(model):
            item.copy_(moved[name])
    assert torch.equal(output, model(*inputs))
    if not is_routed(config):
        assert_close(output, definition(model, kind, inputs))
