"""Bayesian-LoRA: the quantiser, the gates, what training decides, and what is left at the end."""

import itertools
import math

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.mixed import INDEX, TARGETS, Net
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.errors import AdapterFileError, AdapterStateError, ConfigError
from visionlora.io.integers import load_integers, read_integers, save_integers
from visionlora.methods.parts import gates
from visionlora.ops.quantize import (
    WIDTHS,
    from_levels,
    pack,
    residual_quantize,
    step_size,
    to_levels,
    unpack,
)
from visionlora.ranks.bops import bops
from visionlora.ranks.controller import controllers_of
from visionlora.training import RunDirectory, TrainSettings, fit

BETA = torch.tensor([0.8], dtype=torch.float64)


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def opened(bits):
    return torch.tensor([float(width <= bits) for width in WIDTHS], dtype=torch.float64)


# -- quantiser


@pytest.mark.parametrize("bits", [2, *WIDTHS])
def test_open_gates_up_to_a_width_round_to_the_grid_of_that_width(bits):
    x = values(400)
    quantized = residual_quantize(x, BETA, opened(bits))
    step = float(step_size(BETA, bits))
    clipped = x.clamp(-0.8 * (1 - 1e-7), 0.8 * (1 - 1e-7))
    assert_close(quantized, step * torch.round(clipped / step))
    levels = to_levels(quantized, BETA, bits)
    assert int(levels.abs().max()) <= 2 ** (bits - 1) - 1
    if bits <= 4:  # symmetric: 3 levels at two bits, 15 at four
        assert len(levels.unique()) == 2**bits - 1
    assert_close(from_levels(levels, BETA, bits), quantized)
    assert torch.equal(residual_quantize(quantized, BETA, opened(bits)), quantized)


def test_the_residuals_add_up_to_the_next_width():
    x = values(50)
    z = torch.tensor([0.7, 0.6, 0.5, 0.4], dtype=torch.float64)
    levels = [residual_quantize(x, BETA, opened(bits)) for bits in (2, *WIDTHS)]
    rests = [after - before for before, after in itertools.pairwise(levels)]
    expected = levels[0]
    for weight, rest in zip(z.cumprod(0), rests, strict=True):
        expected = expected + weight * rest
    assert_close(residual_quantize(x, BETA, z), expected)


def test_a_closed_gate_makes_the_wider_ones_irrelevant():
    x = values(50)
    for place in range(4):
        one, two = opened(32), opened(32)
        one[place] = two[place] = 0.0
        two[place + 1 :] = torch.rand(3 - place, dtype=torch.float64)
        assert torch.equal(residual_quantize(x, BETA, one), residual_quantize(x, BETA, two))
    gate = opened(2).requires_grad_()
    residual_quantize(x, BETA, gate).square().sum().backward()
    assert gate.grad[0] != 0
    assert not gate.grad[1:].any()


def test_gradients_pass_rounding_and_reach_the_range_where_entries_are_clipped():
    x = torch.tensor([0.1, -0.3, 1.5, -2.0], dtype=torch.float64, requires_grad=True)
    beta = BETA.clone().requires_grad_()
    weight = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    (residual_quantize(x, beta, opened(32)) * weight).sum().backward()
    assert_close(x.grad, torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        beta.grad, torch.tensor([3.0 - 5.0], dtype=torch.float64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("bits", [2, *WIDTHS])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 8)])
def test_packed_levels_come_back(bits, shape):
    levels = to_levels(residual_quantize(values(*shape), BETA, opened(bits)), BETA, bits)
    packed = pack(levels, bits)
    assert packed.numel() * packed.element_size() == math.ceil(levels.numel() * bits / 8)
    assert torch.equal(unpack(packed, bits, shape), levels)


# -- gates


@pytest.mark.parametrize("phi", [-3.0, -1.0, 0.0, 1.0, 4.0])
def test_the_probability_of_an_open_gate_is_its_formula(phi):
    torch.manual_seed(0)
    logits = torch.full((200_000,), phi, dtype=torch.float64)
    drawn = gates.gate_values(logits, training=True)
    probability = float(gates.open_probability(logits[:1]))
    deviation = (probability * (1 - probability) / len(logits)) ** 0.5
    assert float((drawn > 0).double().mean()) == pytest.approx(
        probability, abs=5 * deviation + 1e-6
    )
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) <= 1.0
    assert probability == pytest.approx(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - phi)))


def test_gates_are_decided_in_evaluation_and_still_have_a_gradient():
    phi = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    decided = gates.gate_values(phi, training=False)
    expected = (1 - gates.open_probability(phi) < 0.34).double()
    assert torch.equal(decided, expected)
    decided.sum().backward()
    assert bool((phi.grad > 0).all())
    certain = gates.certain(phi.detach())
    assert torch.equal(gates.gate_values(certain, training=True), expected)


# -- the method


def plain():
    torch.manual_seed(7)
    return Net().double()


def net(seed=1, **options):
    """Return a model whose sites have different ranks and widths."""
    model = vl.inject(plain(), "bayesian-lora", targets=TARGETS, **{"rank": 4, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, delta in enumerate(deltas(model)):
            delta.E.copy_(torch.randn(delta.E.shape, generator=generator))
            delta.B.add_(torch.randn(delta.B.shape, generator=generator))
            delta.range_B.fill_(float(delta.B.abs().max().log()))
            if place:
                delta.gates_rank[place % 3] = -5.0
                delta.gates_A[place % 4] = -5.0
                delta.gates_B[(place + 1) % 4] = -5.0
    return model


def deltas(model):
    return [
        delta
        for host in vl.record.hosts_of(model).values()
        for delta in host.adapters["default"].values()
    ]


def test_evaluation_uses_decided_gates_and_quantised_factors():
    model = net().eval()
    for delta in deltas(model):
        rank, bits = delta.effective_rank, {name: delta.bits(name) for name in "AB"}
        up, down = delta.factors()
        assert_close(up, residual_quantize(delta.B, delta.beta("B"), opened(bits["B"])))
        quantized = residual_quantize(delta.A, delta.beta("A"), opened(bits["A"]))
        assert_close(down[:rank], delta.E[:rank, None] * quantized[:rank])
        assert not down[rank:].any()
    found = [(d.effective_rank, d.bits("A"), d.bits("B")) for d in deltas(model)]
    assert found == [(4, 32, 32), (2, 4, 8), (3, 8, 16), (1, 16, 2), (2, 2, 4), (3, 4, 8)]


def test_noise_is_drawn_while_training_only():
    model = net()
    with torch.no_grad():
        for delta in deltas(model):
            delta.gates_A.fill_(0.0)
    assert not torch.equal(model(INDEX), model(INDEX))
    torch.manual_seed(0)
    first = model(INDEX)
    torch.manual_seed(0)
    assert torch.equal(model(INDEX), first)
    model.eval()
    assert torch.equal(model(INDEX), model(INDEX))


@pytest.mark.parametrize("training", [True, False])
def test_merging_uses_the_quantised_factors_in_either_mode(training):
    model = net()
    expected = model.eval()(INDEX)
    model.train(training)
    with vl.merged(model):
        assert_close(model.eval()(INDEX), expected)


def test_the_penalty_is_its_definition():
    model = net(lambda_bits=0.3, lambda_rank=0.7)
    delta = deltas(model)[1]
    delta.largest, delta.pressure = 100, 0.5
    expected = 0.0
    for name, size in (("A", delta.A.numel()), ("B", delta.B.numel())):
        probability = gates.open_probability(getattr(delta, f"gates_{name}")).detach()
        for place, width in enumerate(WIDTHS):
            expected += 0.3 * size / 100 * width * float(probability[: place + 1].prod())
    probability = gates.open_probability(delta.gates_rank).detach()
    expected += 0.7 * sum(float(probability[:count].prod()) for count in range(4))
    assert delta.penalty().item() == pytest.approx(0.5 * expected)


def test_the_controller_lets_the_penalty_rise_and_knows_the_largest_site():
    model = net()
    groups = vl.parameter_groups(model, 1e-3, 0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    first = deltas(model)[0]
    assert rates[id(first.gates_A)] == rates[id(first.gates_rank)] == (pytest.approx(1e-2), 0.0)
    assert rates[id(first.range_B)] == (1e-3, 0.0)
    assert rates[id(first.A)] == (1e-3, 0.1)
    optimizer = torch.optim.AdamW(groups)
    stepper = Stepper(model, optimizer, dynamics=controllers_of(model, optimizer, steps=40))
    seen = []
    for _ in range(6):
        stepper.step([INDEX], lambda index: model(index).square().mean())
        seen.append(first.pressure)
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert {delta.largest for delta in deltas(model)} == {4 * 18}


def test_finalising_crops_ranks_fixes_gates_and_keeps_the_function(tmp_path):
    model = net(alpha=3.0)
    expected = model.eval()(INDEX)
    before = [(d.effective_rank, d.bits("A"), d.bits("B"), d.scale) for d in deltas(model)]
    counted = bops(model)
    vl.finalize(model.train())
    assert_close(model.eval()(INDEX), expected)
    after = [(len(d.E), d.bits("A"), d.bits("B"), d.scale) for d in deltas(model)]
    assert after == [pytest.approx(item) for item in before]
    for delta in deltas(model):
        assert delta.config.rank == len(delta.E) == delta.effective_rank
        assert_close(delta.quantized("A"), delta.A)
        assert delta.A.requires_grad
        assert not any(getattr(delta, name).requires_grad for name in delta.groups)
        assert torch.equal(delta.train().factors()[1], delta.eval().factors()[1])  # no noise left
    assert bops(model, full_rank=4) == counted
    kept = deltas(model)
    vl.finalize(model)
    assert all(one is other for one, other in zip(kept, deltas(model), strict=True))
    path = vl.save(model, tmp_path / "a.safetensors")
    assert torch.equal(vl.load(plain(), path).eval()(INDEX), model.eval()(INDEX))


def test_an_integer_file_gives_the_function_of_evaluation(tmp_path):
    model = net(alpha=3.0)
    expected = model.eval()(INDEX)
    path = save_integers(model.train(), tmp_path / "a.safetensors")
    assert len(deltas(model)[1].E) == 4  # the model stays as it is
    loaded = load_integers(plain(), path).eval()
    assert_close(loaded(INDEX), expected)
    assert {delta.config.method for delta in deltas(loaded)} == {"lora"}
    with vl.merged(loaded):
        assert_close(loaded(INDEX), expected)
    vl.finalize(model)
    again = save_integers(model, tmp_path / "b.safetensors")
    for key, tensor in read_integers(again).tensors.items():
        assert_close(tensor, read_integers(path).tensors[key])
    single = load_integers(plain().float(), path).eval()
    assert_close(single(INDEX), expected)


def test_an_integer_file_is_smaller_than_floats(tmp_path):
    model = vl.inject(nn.Linear(256, 256), "bayesian-lora", rank=16)
    for name in "AB":
        model.adapters["default"]["weight"].get_parameter(f"gates_{name}").data.copy_(
            torch.tensor([6.0, -6.0, 6.0, 6.0])
        )
    path = save_integers(model, tmp_path / "a.safetensors")
    assert path.stat().st_size < 2 * 16 * 256 // 2 + 2048  # four bits an entry


def test_damaged_and_foreign_integer_files_are_refused(tmp_path):
    model = net()
    path = save_integers(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError):
        load_integers(Net().double(), path)  # other weights
    with pytest.raises(AdapterFileError):
        load_integers(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(AdapterFileError, match="no integer adapter"):
        load_integers(plain(), vl.save(model, tmp_path / "native.safetensors"))
    data = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    for name in ("cut", "missing"):
        with pytest.raises(AdapterFileError):
            load_integers(plain(), tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterStateError, match="only bayesian-lora"):
        save_integers(vl.inject(plain(), "lora", targets="qkv", rank=2), tmp_path / "x.safetensors")


def test_bit_operations_are_counted_per_site():
    model = net()
    report = bops(model, tokens=3)
    for item, delta in zip(report.sites, deltas(model), strict=True):
        out, columns = delta.B.shape[0], delta.A.shape[1]
        columns *= {"conv.weight": 2, "table.weight": 0}.get(item.site, 1)
        rank, down, up = delta.effective_rank, delta.bits("A"), delta.bits("B")
        assert item.bops == 3 * rank * 32 * (columns * down + out * up)
        assert item.baseline == 3 * 4 * 32 * 32 * (columns + out)
    assert report.share == report.bops / report.baseline < 1
    assert "bit operations" in str(report)
    assert bops(vl.inject(plain(), "lora", targets="qkv", rank=2)).share == 1.0
    with pytest.raises(AdapterStateError, match="no factor form"):
        bops(vl.inject(plain(), "dora", targets="qkv", rank=2))


def train(loss, seed=1, steps=120, **options):
    """Train on a planted change of rank 2; return layer, inputs and targets."""
    torch.manual_seed(seed)
    layer = nn.Linear(12, 4, bias=False)
    planted = torch.randn(4, 2) @ torch.randn(2, 12)
    x = torch.randn(256, 12)
    y = (x @ (layer.weight + planted).t()).detach()
    vl.inject(layer, "bayesian-lora", rank=4, **options)
    optimizer = torch.optim.AdamW(vl.parameter_groups(layer, 2e-2, 0.0))
    stepper = Stepper(layer, optimizer, dynamics=controllers_of(layer, optimizer, steps))
    for _ in range(steps):
        stepper.step([0], lambda _: loss(layer(x), y))
    return layer.eval(), x, y


def test_bit_operations_fall_as_the_weight_grows_while_accuracy_holds():
    def classify(logits, y):
        return nn.functional.cross_entropy(logits, y.argmax(1))

    accuracies, shares = [], []
    for weight in (0.0, 3e-4, 3e-3):
        layer, x, y = train(classify, lambda_bits=weight, lambda_rank=weight)
        accuracies.append(float((layer(x).argmax(1) == y.argmax(1)).double().mean()))
        shares.append(bops(layer).share)
    assert shares[0] == 1.0
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.3
    assert min(accuracies) > accuracies[0] - 0.03
    assert accuracies[0] > 0.95


def test_undecided_rank_gates_find_the_planted_rank():
    options = {"lambda_bits": 0.0, "lambda_rank": 1e-2, "rank_logit": 0.0}
    layer, x, y = train(nn.functional.mse_loss, **options)
    assert layer.adapters["default"]["weight"].effective_rank == 2
    assert float((layer(x) - y).detach().square().mean() / y.var()) < 0.02


def test_a_run_resumes_exactly_and_ends_with_decided_gates(tmp_path):
    def start(folder, batches, resume=False):
        model = vl.inject(plain(), "bayesian-lora", targets=TARGETS, rank=3, rank_logit=0.0)
        optimizer = torch.optim.AdamW(vl.parameter_groups(model, 1e-2, 0.0))
        settings = TrainSettings(steps=8, device="cpu", checkpoint_every=3)
        run = RunDirectory(folder, resume=resume)
        fit(model, optimizer, lambda m, x: m(x).square().mean(), batches, settings, run)
        return model

    def failing(index):
        if index == 5:
            raise OSError("power cut")
        return INDEX

    whole = start(tmp_path / "whole", lambda _: INDEX)
    with pytest.raises(OSError, match="power cut"):
        start(tmp_path / "killed", failing)
    resumed = start(tmp_path / "killed", lambda _: INDEX, resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.train()(INDEX), whole.train()(INDEX))
    assert all(delta.gates_A.abs().min() == 20.0 for delta in deltas(whole))


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="lambda_bits"):
        vl.inject(plain(), "bayesian-lora", targets="qkv", lambda_bits=-1.0)
