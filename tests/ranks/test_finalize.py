"""Laws of every method with a controller, on every kind of site: train, finalise, save, merge."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.contract.cases import randomise
from tests.contract.kinds import KINDS
from tests.ranks.cases import METHODS
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, StepContext, Stepper
from visionlora.errors import AdapterStateError
from visionlora.ranks import Controller, Penalties, controllers_of
from visionlora.ranks.structure import places_of

STEPS = 8
SERVED = [kind for kind in KINDS if not kind.norm]
SHORT = {
    "sora": {"rank": 2},
    "adalora": {"rank": 2, "target": 1.0, "interval": 2},
    "increlora": {"target": 2.0, "add": 1, "watch": 2},
    "diffora": {"rank": 2, "search": 0.5},
    "spiel": {"density": 0.3, "every": 4, "observe": 2},
}


def trained(method, kind):
    """Return a model after a short run."""
    model = vl.inject(kind.model(), method, kind.target, **SHORT[method])
    randomise(model)
    optimizer = torch.optim.AdamW([p for _, p in vl.trainable_parameters(model)], lr=0.01)
    controllers = controllers_of(model, optimizer, STEPS)
    stepper = Stepper(model, optimizer, dynamics=controllers)
    for step in range(STEPS):
        stepper.step([kind.inputs(step)], lambda batch: model(*batch).square().mean())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for _, p in vl.trainable_parameters(model)}
    return model


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", SHORT)
def test_finalised_is_masked_is_merged_is_saved(method, kind, tmp_path):
    model, inputs = trained(method, kind), kind.inputs()
    if method == "sora":
        with torch.no_grad():
            for place in places_of(model):
                place.delta.g[0] = 0
    expected = model(*inputs)
    vl.finalize(model)
    assert_close(model(*inputs), expected)
    again = model(*inputs)
    names = [name for name, _ in model.named_parameters()]
    vl.finalize(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(*inputs), again)
    path = vl.save(model, tmp_path / "adapter.safetensors")
    assert torch.equal(vl.load(kind.model(), path)(*inputs), again)
    with vl.merged(model):
        assert_close(model(*inputs), expected)
    base = kind.model()(*inputs)
    vl.eject(model)
    assert torch.equal(model(*inputs), base)


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def with_gates(*gates):
    model = vl.inject(stack(), "sora", "type:Linear", rank=3)
    randomise(model)
    with torch.no_grad():
        for place, values in zip(places_of(model), gates, strict=True):
            place.delta.g.copy_(torch.tensor(values, dtype=torch.float64))
    return model


def test_a_site_without_rank_leaves_the_adapter_and_its_layer_is_plain_again(tmp_path):
    model = with_gates([0.0, 0.0, 0.0], [0.0, 2.0, -1.0])
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    vl.finalize(model)
    assert type(model[0]) is nn.Linear
    (place,) = places_of(model)
    assert (place.delta.config.method, place.delta.config.rank) == ("lora", 2)
    assert vl.summary(model).trainable == 2 * 13
    assert_close(model(x), expected)
    path = vl.save(model, tmp_path / "adapter.safetensors")
    assert torch.equal(vl.load(stack(), path)(x), model(x))
    assert_close(vl.eject(model, merge=True)(x), expected)


def test_an_adapter_without_any_rank_is_an_error_and_stays():
    model = with_gates([0.0] * 3, [0.0] * 3)
    with pytest.raises(AdapterStateError, match="'default' has no rank left at any of its sites"):
        vl.finalize(model)
    assert len(places_of(model)) == 2


def test_a_merged_model_is_not_finalised():
    model = vl.merge(with_gates([1.0] * 3, [0.0, 1.0, 1.0]))
    with pytest.raises(AdapterStateError, match="unmerge before you finalize"):
        vl.finalize(model)


def test_other_adapters_and_methods_stay_as_they_are():
    model = vl.inject(with_gates([0.0] * 3, [1.0] * 3), "dora", "0", name="second", rank=2)
    randomise(model)
    with torch.no_grad():
        places_of(model, "default")[0].delta.g.zero_()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    vl.finalize(model)
    assert_close(model(x), expected)
    assert [(p.path, p.adapter, p.delta.config.method) for p in places_of(model)] == [
        ("0", "second", "dora"),
        ("2", "default", "lora"),
    ]


def test_controllers_are_those_of_active_trained_adapters_and_come_first():
    model = vl.inject(stack(), "sora", "type:Linear", rank=2, name="one")
    vl.inject(model, "adalora", "0", rank=2, target=1.0, name="two")
    vl.inject(model, "lora", "0", rank=2, name="three")
    optimizer = torch.optim.AdamW([p for _, p in vl.trainable_parameters(model)])
    controllers = controllers_of(model, optimizer, STEPS)
    assert {item.name for item in controllers} == {"sora:one", "adalora:two"}
    late = type("Late", (Dynamics,), {"name": "late"})()
    order = Stepper(model, optimizer, dynamics=[late, *controllers]).dynamics
    assert order == (*controllers, late)
    vl.use(model, "two")
    assert [item.name for item in controllers_of(model, optimizer, STEPS)] == ["adalora:two"]
    vl.use(model, "three")
    assert controllers_of(model, optimizer, STEPS) == []


def test_declared_penalties_are_summed_over_sites_and_what_they_share():
    model = vl.inject(stack(), "vera", "type:Linear", rank=2)
    optimizer = torch.optim.SGD([p for _, p in vl.trainable_parameters(model)], lr=0.1)
    controller = Penalties(model, "default", "vera", optimizer, STEPS)
    parts = [place.delta for place in places_of(model)]
    context = StepContext(0, model, optimizer, replay=lambda: None)
    assert controller.penalty(context) is None
    for number, part in enumerate([*parts, parts[0].shared[0]]):
        part.penalty = lambda value=float(10**number): torch.tensor(value, dtype=torch.float64)
    assert controller.penalty(context).item() == 111.0


@pytest.mark.parametrize("case", METHODS)
def test_every_method_brings_its_controller(case):
    method, options = METHODS[case]
    assert issubclass(vl.get_method(method).controller, Controller)
    vl.build_config(method, options)
