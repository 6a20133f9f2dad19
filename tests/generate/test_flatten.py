"""Adapters as vectors: nothing is lost, and the statistics are those of the tasks."""

import re

import pytest
import torch

from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError
from visionlora.generate import Layout, Statistics

MIXED = {"z": (3, 4), "a.B": (5, 1), "scalar": (), "a.A": (2, 3, 1), "none": (0, 4)}


def mixed() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in MIXED.items()}


def test_flatten_and_back_is_the_identity_on_mixed_shapes():
    tensors = mixed()
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.length,) == (24,)
    back = layout.unflatten(vector)
    assert list(back) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


def test_the_order_of_the_tensors_does_not_matter():
    tensors = mixed()
    again = dict(reversed(tensors.items()))
    assert torch.equal(Layout.of(again).flatten(again), Layout.of(tensors).flatten(tensors))


def test_padding_reaches_the_next_multiple():
    layout = Layout.of(mixed())
    assert [layout.padded(multiple) for multiple in (1, 8, 24, 25)] == [24, 24, 24, 25]


def test_statistics_are_means_over_the_tasks_and_not_over_the_snapshots():
    layout = Layout({"a": (6,), "b": (2, 4)})
    tasks = [torch.randn(3, 14), 5 + 2 * torch.randn(9, 14)]
    found = Statistics.over(layout, tasks)
    for index, part in enumerate((slice(0, 6), slice(6, 14))):
        mean = sum(task[:, part].mean() for task in tasks) / 2
        std = sum(task[:, part].std(unbiased=False) for task in tasks) / 2
        assert_close(found.mean[index], mean)
        assert_close(found.std[index], std)


def test_standardising_is_undone_exactly_and_survives_constant_tensors():
    layout = Layout({"a": (6,), "b": (2, 4)})
    vectors = torch.randn(3, 14)
    vectors[:, :6] = 0.5
    statistics = Statistics.over(layout, [vectors])
    standard = statistics.standardise(layout, vectors)
    assert bool(torch.isfinite(standard).all())
    assert_close(standard[:, 6:].std(unbiased=False), torch.tensor(1.0))
    assert_close(statistics.restore(layout, standard), vectors)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": (2,)}, "lacks b"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "also has c"),
        ({"a": (2,), "b": (4,)}, r"b is \(4,\) there and \(3,\) here"),
    ],
)
def test_the_difference_between_two_layouts_is_said(other, words):
    here = Layout({"a": (2,), "b": (3,)})
    assert re.search(words, here.difference(Layout(other)))
    assert not here.difference(Layout({"a": (2,), "b": (3,)}))


def test_whole_numbers_cannot_be_generated():
    with pytest.raises(AdapterFileError, match="count holds"):
        Layout.of({"count": torch.tensor(3)})
