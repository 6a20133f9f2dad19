"""LISA: what trains, what is remembered, how blocks are drawn, and that nothing is lost."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch

import visionlora as vl
from tests.dynamics.towers_in_blocks import batches, loss, moved, tower, values
from tests.training.toy_training import exact
from visionlora.dynamics import Stepper
from visionlora.dynamics.blocks import blocks_of
from visionlora.dynamics.hft import HFTConfig
from visionlora.dynamics.lisa import LISAConfig
from visionlora.errors import ConfigError
from visionlora.registry import build_config
from visionlora.training import RunDirectory, TrainSettings, fit

OUTSIDE = {"embed.weight", "embed.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def setup(**options):
    model = tower()
    optimizer = adamw(model)
    lisa = LISAConfig(**{"gamma": 2, "every": 3, **options}).build(model, optimizer, 100)
    return model, optimizer, lisa, Stepper(model, optimizer, dynamics=[lisa])


def train(stepper, steps, start=0):
    for step in range(start, start + steps):
        stepper.step([batches(step)], lambda batch: loss(stepper.model, batch))


def state_bytes(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_between_two_draws_gamma_blocks_and_what_is_outside_move_and_nothing_else():
    model, _, lisa, stepper = setup()
    seen = set()
    for draw in range(8):
        active, before = set(lisa.active), values(model)
        train(stepper, 3, 3 * draw)
        blocks = blocks_of(before)
        assert len(active) == 2
        assert moved(before, model) == OUTSIDE | {n for b in active for n in blocks[b]}
        seen |= active
    assert seen == set(blocks_of(values(model)))


def test_frozen_blocks_get_no_gradient_and_do_not_move_by_momentum_or_decay():
    model, _, lisa, stepper = setup(state="kept")
    train(stepper, 3)
    frozen = {n for b in set(lisa.units) - lisa.active for n in lisa.units[b]}
    named = dict(model.named_parameters())
    assert not any(named[name].requires_grad for name in frozen)
    batch = batches(3)
    loss(model, batch).backward()
    assert all((item.grad is None) == (name in frozen) for name, item in named.items())
    before = values(model)
    train(stepper, 2, 3)
    assert not frozen & moved(before, model)


def test_the_optimiser_never_holds_more_than_gamma_blocks_unless_it_keeps_them():
    bound = None
    for state in ("dropped", "kept"):
        model, optimizer, lisa, stepper = setup(state=state, every=2)
        sizes = []
        for draw in range(8):
            train(stepper, 1, 2 * draw)  # after one step of a draw its blocks have their state
            sizes.append((len(optimizer.state), state_bytes(optimizer)))
            train(stepper, 1, 2 * draw + 1)
        block = len(next(iter(lisa.units.values())))
        if state == "dropped":
            assert {count for count, _ in sizes} == {len(OUTSIDE) + 2 * block}
            assert len({size for _, size in sizes}) == 1
            bound = sizes[0]
        else:
            assert sizes[0] == bound
            assert sizes[-1][0] == len(list(model.parameters()))


def test_a_block_that_is_drawn_again_starts_with_fresh_moments_and_one_that_stays_keeps_them():
    _, optimizer, lisa, stepper = setup(gamma=3, every=2)
    named = dict(lisa.model.named_parameters())
    ages, drawn = dict.fromkeys(lisa.units, 0), set(lisa.active)
    stayed = returned = 0
    for draw in range(12):
        before = set(lisa.active)
        train(stepper, 1, 2 * draw)
        for block in lisa.active:
            ages[block] += 1
            steps = {int(optimizer.state[named[n]]["step"]) for n in lisa.units[block]}
            assert steps == {ages[block]}
            stayed += ages[block] > 2
        train(stepper, 1, 2 * draw + 1)
        ages = {b: (age + (b in before)) * (b in lisa.active) for b, age in ages.items()}
        returned += len(lisa.active - before & drawn)
        drawn |= lisa.active
    assert stayed
    assert returned


@pytest.mark.parametrize("state", ["dropped", "kept"])
def test_with_all_blocks_it_is_full_fine_tuning_bit_for_bit(state):
    model, _, _, stepper = setup(gamma=4, state=state)
    plain = tower()
    ordinary = Stepper(plain, adamw(plain))
    for step in range(10):
        train(stepper, 1, step)
        train(ordinary, 1, step)
    assert exact(model) == exact(plain)


def test_blocks_are_drawn_uniformly():
    _, _, lisa, _ = setup(gamma=2)
    count = 3000
    draws = [frozenset(lisa.draw()) for _ in range(count)]
    single = Counter(block for draw in draws for block in draw)
    expected = count * 2 / 4
    # Of blocks drawn together the variance of a frequency is n p (1 - p), and they add up.
    chi = sum((n - expected) ** 2 for n in single.values()) / (expected * (1 - 2 / 4)) * 3 / 4
    assert chi < 16.27  # of 3 degrees of freedom, once in a thousand
    pairs = Counter(draws)
    assert set(pairs) == {frozenset(pair) for pair in combinations(lisa.units, 2)}
    expected = count / math.comb(4, 2)
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 20.52  # 5 degrees


def test_the_seed_alone_decides_whatever_the_global_generator():
    def course(seed):
        torch.default_generator.manual_seed(seed + 17)
        _, _, lisa, _ = setup(seed=seed)
        return [sorted(lisa.active), *(sorted(lisa.draw()) for _ in range(10))]

    assert course(0) == course(0)
    assert course(0) != course(1)


def test_micro_batches_and_skipped_steps_do_not_count():
    _, _, lisa, stepper = setup(every=2)
    first = set(lisa.active)
    state = lisa.generator.get_state()

    def step(factor=1.0):
        parts = [batches(0), batches(1), batches(2)]
        report = stepper.step(parts, lambda batch: factor * loss(stepper.model, batch))
        return report.skipped

    assert not step()
    assert step(math.nan)
    assert step(math.nan)
    assert lisa.active == first
    assert torch.equal(lisa.generator.get_state(), state)
    assert not step()
    assert not torch.equal(lisa.generator.get_state(), state)


def test_a_draw_tells_that_the_trained_parameters_changed():
    _, _, lisa, stepper = setup(every=2)
    for step in range(12):
        before = set(lisa.active)
        report = stepper.step([batches(step)], lambda batch: loss(stepper.model, batch))
        assert report.changed == (lisa.active != before)


def run(model, folder, *, steps=14, source=batches, resume=False, **options):
    optimizer = adamw(model)
    lisa = LISAConfig(**{"every": 3, **options}).build(model, optimizer, steps)
    return fit(
        model,
        optimizer,
        loss,
        source,
        TrainSettings(steps=steps, device="cpu", checkpoint_every=1, log_every=4),
        RunDirectory(folder, resume=resume),
        dynamics=[lisa],
    )


def stopping(after):
    def source(step):
        if step == after:
            raise OSError("power cut")
        return batches(step)

    return source


@pytest.mark.parametrize("state", ["dropped", "kept"])
@pytest.mark.parametrize("after", [2, 6, 10])
def test_a_run_that_died_resumes_bit_identically(after, state, tmp_path):
    whole = tower()
    run(whole, tmp_path / "whole", state=state)
    with pytest.raises(OSError, match="power cut"):
        run(tower(), tmp_path / "part", state=state, source=stopping(after))
    resumed = tower()
    result = run(resumed, tmp_path / "part", state=state, resume=True)
    assert result.resumed_from == after
    assert exact(resumed) == exact(whole)


def test_all_that_was_trained_is_saved_and_loads(tmp_path):
    def adapted():
        model = vl.inject(tower(), "full", "type:Linear", exclude="head")
        return vl.freeze_base(model, ["head", "*.norm1", "norm"])

    model = adapted()
    count = len(list(vl.trainable_parameters(model)))
    for resume in (False, True):  # a finished run too, which is taken up and has nothing to do
        again = adapted()
        run(again, tmp_path / "run", resume=resume)
        assert len(list(vl.trainable_parameters(again))) == count
        path = vl.save(again, tmp_path / "adapter.safetensors")
        fresh = vl.load(tower(), path)
        inputs = batches(99)[0]
        assert torch.equal(fresh(inputs), again(inputs))
        assert not torch.equal(fresh(inputs), tower()(inputs))


def test_an_interrupted_run_leaves_everything_trainable(tmp_path):
    model = tower()
    with pytest.raises(OSError, match="power cut"):
        run(model, tmp_path, source=stopping(4))
    assert all(item.requires_grad for item in model.parameters())


def test_changes_of_the_whole_weight_train_by_blocks():
    model = vl.inject(tower(), "full", "blocks.*")
    optimizer = torch.optim.AdamW([p for _, p in vl.trainable_parameters(model)], lr=1e-2)
    lisa = LISAConfig(gamma=1, every=2).build(model, optimizer, 10)
    stepper = Stepper(model, optimizer, dynamics=[lisa])
    (active,), before = lisa.active, values(model)
    train(stepper, 2)
    assert moved(before, model) == set(lisa.units[active])
    assert len(lisa.units[active]) == 6
    assert all(".adapters." in name for name in lisa.units[active])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("head", r"lisa: none of the 2 trained tensors is in a repeated block: head.weight, head"),
        ("blocks.1", "lisa: gamma 2 is more than the 1 blocks that are trained"),
    ],
)
def test_a_model_without_enough_blocks_is_refused(train, message):
    model = vl.freeze_base(tower(), train)
    with pytest.raises(ConfigError, match=message):
        LISAConfig().build(model, adamw(model), 10)


def test_impossible_options_and_partners_are_refused():
    for options in ({"gamma": 0}, {"every": 0}):
        with pytest.raises(ConfigError, match="must be at least 1, got 0"):
            LISAConfig(**options)
    with pytest.raises(ConfigError, match="state must be one of 'dropped', 'kept'"):
        LISAConfig(state="forgotten")
    with pytest.raises(ConfigError, match="both decide what is frozen"):
        LISAConfig().check(build_config("full"), [HFTConfig()])


def test_a_state_of_other_blocks_is_refused():
    _, _, lisa, _ = setup()
    other = vl.freeze_base(tower(), "blocks.1")
    one = LISAConfig(gamma=1).build(other, adamw(other), 10)
    state = {**lisa.state_dict(), "active": ["blocks.0", "blocks.2"]}
    with pytest.raises(ConfigError, match=r"lisa: the saved run trained blocks\.0, which"):
        one.load_state_dict(state)
