"""ALLoRA: gradients against the formulas on every kind of layer, and what a step leaves behind."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.contract.cases import adapted, changed_weights, deltas_of, gradients, randomise
from tests.contract.kinds import KINDS, Kind
from tests.tolerances import assert_close
from visionlora.dynamics import Dynamics, Stepper
from visionlora.dynamics.allora import ALLoRAConfig, RowGain
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta
from visionlora.ops import scale_gradient
from visionlora.registry import build_config, build_dynamics

TIMM = Kind(
    "timm-qkv",
    lambda: Attention(12, num_heads=2, qkv_bias=True),
    ((2, 5, 12),),
    {"q": ("qkv.weight", slice(0, 12)), "v": ("qkv.weight", slice(24, 36))},
    target="layer.qkv[q,v]",
)
KIND = {kind.name: kind for kind in [*KINDS, TIMM]}
METHODS = {
    "lora": build_config("lora", {"rank": 2}),
    "arms": build_config("block-lora", {"rank": 2, "alpha": 2.0, "scaling": "standard"}),
    "grid": build_config(
        "block-lora", {"rank": 2, "alpha": 2.0, "scaling": "standard", "layout": "grid"}
    ),
    "slora": build_config("slora", {"rank": 2}),
    "offset": build_config("lora", {"rank": 2, "offset": 2}),
}
METHODS = {name: replace(config, dropout=0.0) for name, config in METHODS.items()}


@contextmanager
def gained(model, **options):
    """Hold the model as it is inside a step."""
    built = ALLoRAConfig(**options).build(model, None, 1)
    built.on_step_begin(None)
    try:
        yield model
    finally:
        built.on_step_failed(None)


def prepared(name, kind, **options):
    """Return a model with random trainables, and a constant pair if the method has one."""
    model = adapted(METHODS[name], kind, **options)
    for module in model.modules():
        if isinstance(module, Delta) and name == "offset":
            module.A0.normal_()
            module.B0.normal_()
    return model


def expected(model, kind, inputs, eta=2.0):
    """Return `{key: (gradients of the Delta's parameters)}` from the dense gradient."""
    base = kind.model()
    weights = {
        name: item.detach().requires_grad_()
        for name, item in changed_weights(model, kind, base).items()
    }
    output = functional_call(base, {f"layer.{k}": v for k, v in weights.items()}, inputs)
    dense = dict(zip(weights, gradients(output, list(weights.values())), strict=True))
    found = {}
    for key, delta in deltas_of(model).items():
        name, rows = kind.views[key]
        G = dense[name][rows]
        if kind.indices:
            G[kind.model().layer.padding_idx] = 0
            G = G.t()
        change = delta.delta(torch.zeros_like(G.flatten(1)))
        a = (change.detach().norm(dim=1) + eta**-2).rsqrt()
        tensors = list(delta.parameters())
        found[key] = torch.autograd.grad(change, tensors, a[:, None] * G.flatten(1))
    return found


@pytest.mark.parametrize("mode", ["auto", "factored", "dense"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [("lora", name) for name in KIND if "norm" not in name]
    + [
        (method, name)
        for method in ("arms", "slora", "offset")
        for name in ("linear-tall", "mha-self")
    ]
    + [("grid", name) for name in ("linear-square", "conv-1x1", "mha-self", "timm-qkv")],
)
def test_gradients_equal_the_formulas_and_nothing_else_changes(method, kind, mode):
    kind = KIND[kind]
    model, inputs = prepared(method, kind, mode=mode), kind.inputs()
    sources = [item.requires_grad_() for item in inputs if item.is_floating_point()]
    own = [item for delta in deltas_of(model).values() for item in delta.parameters()]
    plain = model(*inputs)
    wanted = [item for found in expected(model, kind, inputs).values() for item in found]
    wanted += gradients(plain, [*own, *sources])[len(own) :]
    with gained(model):
        output = model(*inputs)
        assert torch.equal(output, plain)
        for one, other in zip(gradients(output, [*own, *sources]), wanted, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("name", ["linear-tall", "linear-many-tokens", "conv-strided"])
def test_the_gradient_of_the_input_has_the_gain_if_asked(name):
    kind = KIND[name]
    model, (x,) = prepared("lora", kind), kind.inputs()
    x.requires_grad_()
    (delta,) = deltas_of(model).values()
    layer = kind.model().layer
    change = delta.delta(layer.weight.flatten(1)).detach().reshape(layer.weight.shape)
    a = (change.flatten(1).norm(dim=1) + 0.25).rsqrt()
    operation = F.linear
    if isinstance(layer, nn.Conv2d):
        a = a[:, None, None]

        def operation(x, weight):
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)

    (wanted,) = gradients(layer(x) + scale_gradient(operation(x, change), a), [x])
    factors = expected(model, kind, (x,))["weight"]
    with gained(model, scale_input_grad=True):
        found, *others = gradients(model(x), [x, *delta.parameters()])
    assert_close(found, wanted)
    for one, other in zip(others, factors, strict=True):
        assert_close(one, other)


def test_every_gain_is_eta_at_first_and_falls_with_the_row():
    kind = KIND["linear-tall"]
    (delta,) = deltas_of(vl.inject(kind.model(), METHODS["lora"], "layer")).values()
    gain = RowGain(3.0, False)
    assert_close(gain(*delta.factors(), 1), torch.full((20,), 3.0, dtype=torch.float64))
    with torch.no_grad():
        delta.B[4] = 1.0
        delta.B[7] = 2.0
    a = gain(*delta.factors(), 1)
    assert float(a[7]) < float(a[4]) < 3.0 == pytest.approx(float(a[5]))
    row = float((delta.B @ delta.A)[7].detach().norm())
    assert float(a[7]) == pytest.approx((row + 1 / 9) ** -0.5)


def test_the_first_sgd_step_is_eta_times_that_of_lora():
    kind = KIND["qkv-slices"]
    moved = []
    for dynamics in ([], ["allora"]):
        model = vl.inject(kind.model(), METHODS["lora"], kind.target)
        step_once(model, kind, dynamics, torch.optim.SGD)
        moved.append(deltas_of(model))
    start = deltas_of(vl.inject(kind.model(), METHODS["lora"], kind.target))
    for key, delta in moved[0].items():
        assert bool(delta.B.any())
        assert_close(moved[1][key].B, 2.0 * delta.B)
        assert torch.equal(moved[1][key].A, start[key].A)  # B = 0, so A has no gradient yet


def step_once(model, kind, names, optimizer, loss=None, **options):
    parameters = [item for _, item in vl.trainable_parameters(model)]
    made = optimizer(parameters, lr=0.1)
    dynamics = [build_dynamics(name, options).build(model, made, 1) for name in names]
    stepper = Stepper(model, made, dynamics=dynamics)
    return stepper.step([kind.inputs()], loss or (lambda batch: model(*batch).square().mean()))


def test_strength_multiplies_the_scaled_gradient():
    kind = KIND["conv-strided"]
    model, inputs = prepared("lora", kind), kind.inputs()
    (delta,) = deltas_of(model).values()
    weight = torch.ones(model(*inputs).shape, dtype=torch.float64)  # the loss is linear in y

    def found():
        return torch.autograd.grad((model(*inputs) * weight).sum(), list(delta.parameters()))

    with gained(model):
        full = found()
        vl.set_scale(model, 0.5)
        for one, other in zip(found(), full, strict=True):
            assert_close(one, 0.5 * other)


def test_adapters_of_different_forms_on_one_layer():
    kind = KIND["linear-square"]
    model, (x,) = kind.model(), kind.inputs()
    for name in ("lora", "grid"):
        vl.inject(model, METHODS[name], "layer", name=name, mode="factored")
    randomise(model)
    deltas = [deltas_of(model, name)["weight"] for name in ("lora", "grid")]
    x = x.requires_grad_()
    plain = model(x)
    changes = [item.delta(model.layer.weight) for item in deltas]
    (true,) = gradients(plain, [x])
    with gained(model):
        output = model(x)
        assert torch.equal(output, plain)
        assert_close(gradients(output, [x])[0], true)
        found = [gradients(model(x), list(item.parameters())) for item in deltas]
    weight = (model.layer.weight + sum(changes)).detach().requires_grad_()
    (G,) = gradients(F.linear(x, weight, model.layer.bias), [weight])
    for delta, change, own in zip(deltas, changes, found, strict=True):
        a = (change.detach().norm(dim=1) + 0.25).rsqrt()
        wanted = torch.autograd.grad(change, list(delta.parameters()), a[:, None] * G)
        for one, other in zip(own, wanted, strict=True):
            assert_close(one, other)


def test_autocast_gives_the_same_gradients_in_its_precision():
    kind = KIND["linear-many-tokens"]
    model, (x,) = prepared("lora", kind).float(), kind.inputs(dtype=torch.float32)
    tensors = [item for _, item in vl.trainable_parameters(model)]
    with gained(model):
        exact = gradients(model(x), tensors)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        assert output.dtype == torch.bfloat16
        for one, other in zip(gradients(output.float(), tensors), exact, strict=True):
            assert one.dtype == torch.float32
            assert_close(one.bfloat16(), other)


def test_gradient_checkpointing_changes_nothing():
    kind = KIND["conv-strided"]
    model, (x,) = prepared("lora", kind), kind.inputs()
    tensors = [item for _, item in vl.trainable_parameters(model)]
    with gained(model):
        plain = gradients(model(x), tensors)
        again = gradients(checkpoint(model, x, use_reentrant=False), tensors)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", ["lora", "arms", "slora"])
def test_update_mode_scales_what_the_optimiser_did_to_B(method, optimizer):
    kind = KIND["mha-self"]
    model = prepared(method, kind)
    other = copy.deepcopy(model)
    before = copy.deepcopy(deltas_of(model))
    step_once(model, kind, ["allora"], optimizer, where="update", eta=1.5)
    step_once(other, kind, [], optimizer)
    for key, delta in deltas_of(model).items():
        old, plain = before[key], deltas_of(other)[key]
        up, down = old.factors()
        a = ((up @ down).detach().norm(dim=1) + 1.5**-2).rsqrt()
        assert_close(delta.B, old.B + a[:, None] * (plain.B - old.B))
        assert torch.equal(delta.A, plain.A)


def test_a_skipped_step_leaves_everything_as_it_was():
    kind = KIND["linear-tall"]
    for where in ("grad", "update"):
        model = prepared("lora", kind)
        before = copy.deepcopy(model.state_dict())
        report = step_once(
            model,
            kind,
            ["allora"],
            torch.optim.SGD,
            loss=lambda batch, model=model: model(*batch).sum() * float("nan"),
            where=where,
        )
        assert report.skipped
        assert all(torch.equal(item, before[key]) for key, item in model.state_dict().items())
        assert all(item.row_gain is None for item in deltas_of(model).values())


class Look(Dynamics):
    """Notes what the Deltas have inside a step, and may break it."""

    name = "look"

    def __init__(self, model, error=None):
        self.model, self.error, self.seen = model, error, []

    def on_grads_ready(self, context):
        self.seen = [delta.row_gain for delta in deltas_of(self.model).values()]
        self.copy = copy.deepcopy(self.model)
        self.pickled = pickle.dumps(
            [vars(item)["row_gain"] for item in deltas_of(self.model).values()]
        )
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_the_gain_is_there_inside_a_step_only(error):
    kind = KIND["qkv-slices"]
    model = prepared("lora", kind)
    names = {key: sorted(vars(item)) for key, item in deltas_of(model).items()}
    optimizer = torch.optim.SGD([item for _, item in vl.trainable_parameters(model)], lr=0.1)
    look = Look(model, error)
    allora = ALLoRAConfig().build(model, optimizer, 1)
    stepper = Stepper(model, optimizer, dynamics=[allora, look])
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="out of memory"):
        stepper.step([kind.inputs()], lambda batch: model(*batch).square().mean())
    assert look.seen == [RowGain(2.0, False)] * 2 == pickle.loads(look.pickled)
    assert {key: sorted(vars(item)) for key, item in deltas_of(model).items()} == names
    if error is None:
        look.copy.load_state_dict(model.state_dict())
    assert_close(model(*kind.inputs()), look.copy(*kind.inputs()))
    vl.eject(model)
    assert type(model.layer) is nn.Linear


def test_a_dynamics_that_is_never_stepped_changes_nothing():
    kind = KIND["linear-tall"]
    model, inputs = prepared("lora", kind), kind.inputs()
    tensors = [item for _, item in vl.trainable_parameters(model)]
    plain = gradients(model(*inputs), tensors)
    ALLoRAConfig().build(model, None, 1)
    for one, other in zip(gradients(model(*inputs), tensors), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("lora", {"dropout": 0.1}, "dropout=0, got 0.1"),
        ("lora", {"alpha": 16.0}, "s = 1 .*got s = 2"),
        ("lora", {"scaling": "rslora"}, "s = 1"),
        ("rslora", {}, "s = 1"),
        ("dora", {}, "cannot train dora"),
        ("lora-fa", {}, "cannot train lora-fa"),
        ("lora-xs", {}, "cannot train lora-xs"),
    ],
)
def test_methods_without_a_plain_product_are_refused(method, options, reason):
    kind = KIND["linear-square"]
    config = build_config(method, {"rank": 8, **options})
    model = vl.inject(kind.model(), config, "layer")
    with pytest.raises(ConfigError, match=reason):
        ALLoRAConfig().build(model, None, 1)


def test_models_and_combinations_that_make_no_sense_are_refused():
    kind = KIND["linear-tall"]
    with pytest.raises(ConfigError, match="nothing to do"):
        ALLoRAConfig().build(kind.model(), None, 1)
    model = vl.inject(kind.model(), METHODS["lora"], "layer", mode="dense")
    with pytest.raises(ConfigError, match="read directly"):
        ALLoRAConfig(scale_input_grad=True).build(model, None, 1)
    for eta, reason in ((0.0, "positive, got 0"), (float("inf"), "a finite number, got inf")):
        with pytest.raises(ConfigError, match=f"eta must be {reason}"):
            ALLoRAConfig(eta=eta)
    with pytest.raises(ConfigError, match="needs where='grad'"):
        ALLoRAConfig(where="update", scale_input_grad=True)
    for name in ("lora-pro", "lora+"):
        other = type("Other", (), {"name": name})()
        with pytest.raises(ConfigError, match=f"{name.replace('+', '.')}.*leave one out"):
            ALLoRAConfig().check(METHODS["lora"], [other])
