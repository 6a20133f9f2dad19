"""Bad input is refused in one line, and nothing that was there or was learnt is lost."""

import math

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.composition.runs import (
    CASES,
    WHOLE,
    assert_same,
    mean_loss,
    micro_batches,
    network,
    small,
    train,
)
from tests.contract.cases import assert_unchanged, snapshot
from visionlora.errors import ConfigError, DataError, TargetError, VisionLoraError
from visionlora.registry import list_presets
from visionlora.training.tree import read_tree

LAYERS = ["blocks.*.fc1", "blocks.*.fc2"]
STARTS = [preset.name for preset in list_presets() if vl.parse(preset.name).init is not None]
LOOKING = [name for name in STARTS if vl.parse(name).init.needs]
BY_GRADIENT = [name for name in LOOKING if "gradient" in vl.parse(name).init.needs]
OF_ONE_LAYER = [name for name in STARTS if vl.parse(name).init.residual or name in BY_GRADIENT]


def adapted(preset, model=None):
    """Return a model with the method of a preset, its initialiser and batches to look at."""
    recipe = vl.parse(preset)
    model = network().double() if model is None else model
    model = vl.inject(model, small(recipe.config()), LAYERS)
    return model, small(recipe.init), micro_batches(-1, 1, torch.float64)


def refused(error, said, model, init, batches, **options):
    """Check that a start is refused in one line, and that the model and the draws are as before."""
    before, drawn = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=said) as caught:
        vl.initialise(model, init, batches, mean_loss, **options)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)


# -- starts


@pytest.mark.parametrize("preset", BY_GRADIENT)
def test_a_head_of_zeros_starts_nothing_along_the_gradient(preset):
    model, init, batches = adapted(preset)
    values = model.head.weight.detach().clone()
    nn.init.zeros_(model.head.weight)
    refused(ConfigError, "head", model, init, batches)
    with torch.no_grad():
        model.head.weight.copy_(values)
    assert vl.initialise(model, init, batches, mean_loss).loss > 0


QUANTISED = [torch.int8, torch.uint8, torch.float8_e4m3fn]


def quantise(layer, dtype):
    """Round the weight of a layer."""
    weight = (layer.weight.detach() * 100).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_quantised_layer_gets_no_adapter(dtype):
    model = network()
    quantise(model.blocks[1].fc2, dtype)
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"blocks\.1\.fc2 .* quantised"):
        vl.inject(model, "pissa", LAYERS, rank=2)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("preset", STARTS)
def test_a_weight_that_was_quantised_later_starts_nothing(preset, dtype):
    model, init, batches = adapted(preset)
    quantise(model.blocks[1].fc2, dtype)
    refused(ConfigError, r"blocks\.1\.fc2\.weight is quantised", model, init, batches)


@pytest.mark.parametrize("preset", STARTS)
def test_a_tied_weight_has_no_start_of_its_own(preset):
    model = network().double()
    model.blocks[2].fc1.weight = model.blocks[0].fc1.weight
    if preset in OF_ONE_LAYER:
        both = r"shared \(blocks\.0\.fc1\.weight, blocks\.2\.fc1\.weight\)"
        refused(ConfigError, both, *adapted(preset, model))
    else:
        model, init, batches = adapted(preset, model)
        report = vl.initialise(model, init, batches, mean_loss)
        assert {"blocks.0.fc1.weight", "blocks.2.fc1.weight"} <= set(report.change)
        assert model.blocks[2].fc1.weight is model.blocks[0].fc1.weight


@pytest.mark.parametrize("preset", LOOKING)
def test_a_loader_that_ends_early_starts_nothing(preset):
    model, init, batches = adapted(preset)
    if vl.parse(preset).init.steady is not None:
        init = small(init, tau=None)
    refused(
        DataError, "count=3 batches are needed .* only 1 came", model, init, iter(batches), count=3
    )
    refused(DataError, "at least one batch", model, init, iter([]))
    refused(ConfigError, "looks at data: call initialise", model, init, None)
    vl.initialise(model, init, iter(batches), mean_loss)


@pytest.mark.parametrize("preset", LOOKING)
def test_data_that_are_not_finite_start_nothing(preset):
    model, init, batches = adapted(preset)
    (inputs, targets), *_ = batches
    inputs = inputs.clone()
    inputs[0, 0, 0] = math.nan
    refused(DataError, "nan|NaN", model, init, [(inputs, targets)])


def test_processes_that_cannot_talk_to_each_other_start_nothing(monkeypatch):
    model, init, batches = adapted("lora-ga")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, r"init_process_group\(\) first", model, init, batches)


# -- training


@pytest.mark.parametrize(("parts", "ends", "done"), [(1, 5, 5), (2, 9, 4)])
def test_data_that_end_early_leave_all_steps_done_in_a_checkpoint(
    parts, ends, done, plain, tmp_path
):
    with pytest.raises(DataError, match=rf"ended after {done} of 8 steps; they are in") as caught:
        train("lora", tmp_path, parts=parts, options=WHOLE, ends=ends)
    assert "\n" not in str(caught.value)
    again = train("lora", tmp_path, parts=parts, options=WHOLE, resume=True)
    assert again.resumed_from == done
    assert_same(again.left(), plain("lora").left(), factor=1.0)


def test_data_that_never_begin_leave_no_checkpoint(tmp_path):
    with pytest.raises(DataError, match="ended after 0 of 8 steps: batches must return one for"):
        train("lora", tmp_path, ends=0)
    assert not (tmp_path / "checkpoints").exists()


def nan_gradient(step, loss):
    """Return the loss, in step 4 with a gradient that is not a number."""
    return loss + (0 * loss).square().sqrt() if step == 4 else loss


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_numbers_is_skipped_and_counted_and_changes_nothing(case, tmp_path):
    run = train(
        case, tmp_path, at_step=nan_gradient, checkpoint_every=1, keep_checkpoints=9, log_every=1
    )
    folders = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (4, 5, 6)]
    before, after, later = (read_tree(folder / "state.safetensors") for folder in folders)
    assert [item["stepper"]["skipped"] for item in (before, after, later)] == [0, 1, 1]
    for part in ("structure", "parameters", "constants"):
        assert_same(after["trained"][part], before["trained"][part])
    assert_same(after["trained"]["optimizer"]["state"], before["trained"]["optimizer"]["state"])
    assert_same(after["stepper"]["dynamics"], before["stepper"]["dynamics"])
    moved = [
        not torch.equal(value, before["trained"]["parameters"][name])
        for name, value in later["trained"]["parameters"].items()
    ]
    assert any(moved)
    assert all(item.isfinite().all() for item in run.model.state_dict().values())
    assert math.isfinite(run.loss)


@pytest.mark.parametrize("case", ["lora", "lora-pro", "ggpo", "relora", "lisa", "spiel+sam"])
def test_a_run_that_diverges_stops_and_goes_on_from_before(case, plain, tmp_path):
    settings = {"options": WHOLE, "checkpoint_every": 2, "max_skipped": 2}

    def diverging(step, loss):
        return loss * math.nan if step >= 4 else loss

    with pytest.raises(VisionLoraError, match=r"diverged: loss nan .* after 2 skipped steps"):
        train(case, tmp_path, at_step=diverging, **settings)
    again = train(case, tmp_path, resume=True, **settings)
    assert again.resumed_from == 4
    assert_same(again.left(), plain(case).left())
