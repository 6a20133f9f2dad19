"""Which samples a step sees."""

import itertools
from collections import Counter

import pytest

from visionlora.errors import ConfigError, DataError
from visionlora.training import StepSampler, shard


def test_indices_are_a_pure_function_of_the_step():
    one, two = StepSampler(10, 4, seed=3), StepSampler(10, 4, seed=3)
    forward = [one.indices(step) for step in range(12)]
    assert [two.indices(step) for step in reversed(range(12))] == forward[::-1]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (3, 8), (7, 7)])
def test_every_sample_comes_once_per_epoch(size, batch):
    sampler = StepSampler(size, batch, seed=0)
    stream = [index for step in range(size) for index in sampler.indices(step)]
    assert len(stream) == size * batch
    for epoch in range(batch):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_seeds_and_epochs_have_their_own_order():
    orders = {tuple(StepSampler(50, 50, seed).indices(step)) for seed in (0, 1) for step in (0, 1)}
    assert len(orders) == 4


def test_shards_share_a_batch_equally():
    batch = StepSampler(40, 12).indices(0)
    parts = [shard(batch, rank, 3) for rank in range(3)]
    assert {len(part) for part in parts} == {4}
    assert Counter(itertools.chain(*parts)) == Counter(batch)
    with pytest.raises(ConfigError, match="a batch of 12 cannot be shared equally by 5 processes"):
        shard(batch, 0, 5)


def test_impossible_samplers_are_refused():
    with pytest.raises(DataError, match="0 samples"):
        StepSampler(0, 4)
    with pytest.raises(ConfigError, match="batch_size"):
        StepSampler(4, 0)
