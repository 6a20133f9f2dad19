"""LoRA-Pro: heads, order, scale, precision and saving make no difference."""

import copy

import pytest
import torch

import visionlora as vl
from tests.dynamics.pairs import (
    DATA,
    TARGETS,
    WIDTH,
    adapted,
    assert_same_weights,
    exactly,
    loss_of,
    network,
    train,
    trained,
    trainer,
    weights,
)
from tests.ranks.planted import Problem
from visionlora.dynamics import Stepper
from visionlora.dynamics.lora_pro import LoRAProConfig
from visionlora.ranks.structure import places_of
from visionlora.training import RunDirectory, TrainSettings, fit


def test_order_of_layers_and_another_trainable_head_change_nothing():
    """The head comes first in the optimiser and trains on what does not reach back."""
    one = adapted(rank=2)
    other = adapted(rank=2, net=network(turned=True, head=True))
    head = other.head.weight.requires_grad_()
    first = head.detach().clone()

    def loss(rows):
        outputs = other(DATA[rows])
        aside = other.head(outputs.detach()).square().mean()
        return (outputs - TARGETS[rows]).square().mean() + aside

    train(one, exactly(), steps=3)
    optimizer = torch.optim.AdamW([head, *trained(other)[:-1]], lr=1e-2, weight_decay=0.0)
    stepper = Stepper(other, optimizer, dynamics=[exactly().build(other, optimizer, 3)])
    for _ in range(3):
        stepper.step([slice(None)], loss)
    orders = [[place.path for place in places_of(model)] for model in (one, other)]
    assert orders[0] == orders[1][::-1]
    assert_same_weights(one, other)
    assert set(optimizer.state) == {head}
    assert not torch.equal(head, first)


def test_accumulated_micro_batches_are_one_step():
    one, other = adapted(rank=2), adapted(rank=2)
    steppers = [trainer(model, exactly(), clip_norm=0.05) for model in (one, other)]
    for _ in range(3):
        steppers[0].step([slice(None)], loss_of(one))
        steppers[1].step([slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32)], loss_of(other))
    assert_same_weights(one, other, factor=10)


def test_arms_move_as_their_sum():
    """The weight of n arms on one block moves as that of plain LoRA with the same scale."""
    block = adapted("block-lora", rank=4, blocks=2, alpha=2.0, dropout=0.0)
    plain = adapted(rank=2, alpha=2.0)
    for left, right in zip(places_of(block), places_of(plain), strict=True):
        with torch.no_grad():
            right.delta.A.copy_(left.delta.A)
            right.delta.B.copy_(left.delta.trained_pair()[0])
        assert left.delta.scale == right.delta.scale
    for config in (exactly(), exactly(moments="factor"), exactly(moments="none")):
        models = [copy.deepcopy(block), copy.deepcopy(plain)]
        for model in models:
            train(model, config, steps=3)
        assert_same_weights(*models)


def test_strength_of_an_adapter_is_part_of_its_scale():
    one, other = adapted(rank=2, alpha=6.0), adapted(rank=2, alpha=2.0)
    vl.set_scale(other, 3.0)
    for model in (one, other):
        train(model, exactly(), steps=3)
    assert_same_weights(one, other)


def test_a_constant_pair_is_no_part_of_the_step():
    one = adapted(rank=2)
    other = vl.inject(network(), "lora", ["first", "last"], rank=2, init="pissa")
    for left, right in zip(places_of(one), places_of(other), strict=True):
        with torch.no_grad():
            left.delta.A.copy_(right.delta.A)
            left.delta.B.copy_(right.delta.B)
            left.host.store(left.key, left.host.view(left.key) - right.delta.B0 @ right.delta.A0)
    assert_same_weights(one, other)
    for model in (one, other):
        train(model, exactly(), steps=3)
    assert_same_weights(one, other)


def test_the_rate_is_that_of_the_group():
    model = adapted(rank=2)
    stepper = trainer(model, exactly())
    before = {path: weight.detach() for path, weight in weights(model).items()}
    stepper.optimizer.param_groups[0]["lr"] = 0.0
    stepper.step([slice(None)], loss_of(model))
    assert all(torch.equal(weight, before[path]) for path, weight in weights(model).items())


def test_the_optimizer_has_no_state_of_the_pairs():
    model = adapted(rank=2)
    assert not train(model, exactly()).optimizer.state


@pytest.mark.parametrize("moments", ["full", "factor", "none"])
def test_state_round_trip_continues_bit_for_bit(moments):
    config = LoRAProConfig(moments=moments, warm_b_steps=1)
    whole = adapted(rank=2, seeded=False)
    train(whole, config, steps=5)
    model = adapted(rank=2, seeded=False)
    stepper = train(model, config, steps=2)
    saved = copy.deepcopy(stepper.state_dict())
    again = adapted(rank=2, seeded=False)
    again.load_state_dict(model.state_dict())
    stepper = trainer(again, config)
    stepper.load_state_dict(saved)
    for _ in range(3):
        stepper.step([slice(None)], loss_of(again))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_skipped_step_changes_no_pair_and_no_moment():
    model = adapted(rank=2)
    stepper = train(model, exactly(), steps=2)
    before = copy.deepcopy((stepper.state_dict()["dynamics"], trained(model)))
    report = stepper.step([slice(None)], lambda rows: loss_of(model)(rows) * float("nan"))
    assert report.skipped
    after = stepper.state_dict()["dynamics"]["lora-pro"]
    assert after["steps"] == before[0]["lora-pro"]["steps"]
    moments = before[0]["lora-pro"]["moments"]
    assert after["moments"]["steps"] == moments["steps"]
    for key in ("first", "second"):
        for name, value in moments[key].items():
            assert torch.equal(value, after["moments"][key][name])
    assert all(torch.equal(*pair) for pair in zip(trained(model), before[1], strict=True))


def test_gradients_of_a_failed_step_are_forgotten():
    model = adapted(rank=2)
    twin = copy.deepcopy(model)
    stepper, other = trainer(model, exactly()), trainer(twin, exactly())
    stepper.optimizer.step = lambda: (_ for _ in ()).throw(OSError("power cut"))
    with pytest.raises(OSError, match="power cut"):
        stepper.step([slice(None)], loss_of(model))
    del stepper.optimizer.step
    stepper.optimizer.zero_grad()
    for one, model_ in ((stepper, model), (other, twin)):
        one.step([slice(None)], loss_of(model_))
    assert_same_weights(model, twin)


def test_float32_moments_beside_a_half_precision_model():
    model = vl.inject(network().bfloat16(), "lora", ["first", "last"], rank=2)
    stepper = trainer(model, LoRAProConfig(), lr=1e-3)
    loss = lambda rows: (model(DATA.bfloat16()).float() - TARGETS.float()).square().mean()  # noqa: E731
    stepper.step([slice(None)], loss)
    state = stepper.state_dict()["dynamics"]["lora-pro"]["moments"]
    moments = [item for key in ("first", "second") for item in state[key].values()]
    assert {item.dtype for item in moments} == {torch.float32}
    assert {item.shape for item in moments} == {(7, 6), (6, 7)}


def test_a_large_weight_is_walked_through_in_blocks(monkeypatch):
    """How many rows are worked on at once does not matter."""
    one, other = adapted(rank=2), adapted(rank=2)
    train(one, exactly(), steps=2)
    monkeypatch.setattr("visionlora.dynamics.moments._BLOCK", 2 * WIDTH)
    train(other, exactly(), steps=2)
    assert_same_weights(one, other)


def run(folder, dies_at=None, resume=False):
    problem = Problem(noise=0.2, examples=24)
    model = problem.model("lora", rank=2)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.1)
    dynamics = LoRAProConfig(warm_b_steps=1).build(model, optimizer, 6)

    def batches(step):
        if step == dies_at:
            raise OSError("power cut")
        return problem.batches(step)

    settings = TrainSettings(steps=6, device="cpu", checkpoint_every=1, log_every=6)
    where = RunDirectory(folder, resume=resume)
    fit(model, optimizer, problem.loss, batches, settings, where, dynamics=[dynamics])
    return model


def test_a_run_that_died_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "part", dies_at=4)
    again = run(tmp_path / "part", resume=True)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
